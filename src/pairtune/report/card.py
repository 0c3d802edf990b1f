"""The model card: what the Hub shows about a model, from the same data as the report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pairtune.config import source_name
from pairtune.report.phrases import chain
from pairtune.report.report_data import ReportData
from pairtune.run.records import SourceAccount

_TASK = ("text-generation", "Text Generation")
_METRICS = {"eval_rewards/accuracies": ("accuracy", "Preference accuracy"), "eval_loss": ("loss", "Loss")}


def model_card(run: ReportData, report: str, *, repository: str = "THIS_REPOSITORY", what: str | None = None) -> str:
    """The card as text, front matter included.

    Args:
        run: the run that the model comes from.
        report: the run's report in Markdown, appended to the card, losing trials and findings included.
        repository: the model's repository on the Hub.
        what: the format there: `adapter`, `merged` or `gguf`; None: as the run trained it.
    """
    base = run.environment.base
    what = what or ("adapter" if run.config.method == "lora" else "merged")
    data = ModelCardData(
        model_name=run.name,
        base_model=base.hub_id,
        datasets=_hub_datasets(run) or None,
        library_name={"adapter": "peft", "merged": "transformers", "gguf": "gguf"}[what],
        license=base.license,
        pipeline_tag="text-generation",
        tags=["dpo", "preference-tuning", "pairtune", *{"adapter": ["lora"], "gguf": ["gguf"]}.get(what, [])],
        eval_results=list(_results(run)),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(run, repository, what)}\n{_without_title(report)}"))


def _body(run: ReportData, repository: str, what: str) -> str:
    base, sources = run.environment.base, ", ".join(_names(run.data.sources))
    title = {"adapter": "A LoRA adapter", "merged": "A model", "gguf": "A GGUF model"}[what]
    return f"""# {run.name}

{title}, preference-tuned from {run.base_name} with pairtune ({run.config.loss} loss).

{_loading(repository, what)}

- Base model: {run.base_name}; licence: {base.license or "unknown, look it up before you publish"}
{_lineage(run)}- Preference {run.selection.noun}s: {sources}; licence: {_data_licence(run)}
- Limits: it was trained to prefer one answer over another. It learned no facts, and safety only as far as the pairs
  teach it.
"""


def _lineage(run: ReportData) -> str:
    """The tuned models that this one goes back to; empty if there are none."""
    lineage = run.run.lineage
    return f"- Tuned in {lineage.round} rounds: {' → '.join([*chain(lineage), run.name])}\n" if lineage else ""


def _loading(repository: str, what: str) -> str:
    """How to load the model."""
    if what == "gguf":
        return f"""```sh
llama-cli -hf {repository}     # llama.cpp
ollama run hf.co/{repository}  # Ollama; the Modelfile is for `ollama create`
```"""
    loader, package = {
        "adapter": ("AutoPeftModelForCausalLM", "peft"),
        "merged": ("AutoModelForCausalLM", "transformers"),
    }[what]
    return f"""```python
from {package} import {loader}
from transformers import AutoTokenizer

model = {loader}.from_pretrained("{repository}")
tokenizer = AutoTokenizer.from_pretrained("{repository}")
```"""


def _data_licence(run: ReportData) -> str:
    bundled = all(source.source.startswith("bundled:") for source in run.data.sources)
    return "Apache-2.0, like pairtune" if bundled else "not recorded, look it up at the source"


def _without_title(report: str) -> str:
    """The report's sections, one heading level down."""
    lines = report.splitlines()[1:]
    return "## The run\n" + "\n".join(f"#{line}" if line.startswith("## ") else line for line in lines) + "\n"


def _names(sources: Sequence[SourceAccount]) -> list[str]:
    return list(dict.fromkeys(source_name(source.source) for source in sources))


def _hub_datasets(run: ReportData) -> list[str]:
    """The sources that are Hub datasets, without subset, split and revision."""
    return list(dict.fromkeys(re.split("[:@#]", name)[0] for name in _names(run.data.sources) if "/" in name))


def _results(run: ReportData) -> Iterator[EvalResult]:
    """Results for leaderboards: from the test split if there is one, else from the validation split."""
    metrics = (run.test.metrics if run.test else run.winner_record.best).metrics()
    pairs, split = (run.test.pairs, "test") if run.test else (run.selection.validation_pairs, "validation")
    sources = [source for source in run.data.sources if source.split == split]
    name = ", ".join(_names(sources or run.data.sources[:1]))
    for metric, (kind, title) in _METRICS.items():
        yield EvalResult(
            task_type=_TASK[0],
            task_name=_TASK[1],
            dataset_type=name,
            dataset_name=f"{name} ({pairs} {split} {run.selection.noun}s)",
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(metrics[metric], 4),
        )
