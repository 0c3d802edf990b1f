"""`pairtune push`: upload a run's model, card and report to the Hub in one commit."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from pairtune.errors import BadInput, RunFailed, one_line
from pairtune.publish.export import PARITY, Format, export_run
from pairtune.publish.modelfile import Quantisation
from pairtune.report.card import model_card
from pairtune.report.report_data import ReportData
from pairtune.report.write import shared_report
from pairtune.run.folder import Run

# Weight formats that can run code when loaded.
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
_ADVICE = {
    401: "log in first: hf auth login, or set HF_TOKEN",
    403: "this login may not write there; use a token with write access",
    404: "there is no such repository or revision, or this login cannot see it",
    409: "someone else is writing to it; try again",
    429: "too many requests; wait, then try again",
}
_USER_ERRORS = (401, 403)


@dataclass(frozen=True)
class Pushed:
    """What was uploaded to the Hub, or would be.

    Attributes:
        files: sizes in bytes by name.
        url: of the repository; empty if nothing was sent.
    """

    files: dict[str, int]
    url: str = ""


def push_run(
    run: Run,
    repo: str,
    what: Format = "adapter",
    quantisation: Quantisation = "q8_0",
    *,
    private: bool = False,
    revision: str | None = None,
    anyway: bool = False,
    dry_run: bool = False,
    share_prompts: bool | None = None,
) -> Pushed:
    """Upload a finished run; without the texts of prompts, answers and pairs unless they are to be shared.

    `share_prompts` says whether they are; None: as in the run's settings.

    A retry after a failure sends only what the Hub does not have; nothing is visible before the commit.

    Raises:
        BadInput: the run may not be published, or the login may not write there.
        RunFailed: the Hub cannot be reached, or refuses for another reason.
    """
    _check(run, anyway=anyway)
    with tempfile.TemporaryDirectory(prefix="pairtune-") as scratch:
        files = collect(run, repo, what, Path(scratch), quantisation, share_prompts=share_prompts)
        sizes = {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in files.items()
        }
        if dry_run:
            return Pushed(sizes)
        api = HfApi(library_name="pairtune")
        with _explaining(repo):
            url = api.create_repo(repo, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            operations = [CommitOperationAdd(name, content) for name, content in files.items()]
            api.create_commit(
                repo, operations, commit_message=f"{run.root.resolve().name} by pairtune", revision=revision
            )
    return Pushed(sizes, str(url))


def collect(
    run: Run,
    repo: str,
    what: Format,
    scratch: Path,
    quantisation: Quantisation = "q8_0",
    *,
    share_prompts: bool | None = None,
) -> dict[str, bytes | Path]:
    """The files to publish for a run, by name in the repository.

    Raises:
        BadInput: the adapter's base model exists only on this machine, or a file is in an unsafe format.
    """
    export_run(run, what, scratch / what, quantisation)
    if what == "adapter":
        settings = json.loads((scratch / what / "adapter_config.json").read_text(encoding="utf-8"))
        if Path(settings["base_model_name_or_path"]).is_absolute():
            raise BadInput(
                f"{run.root}: the adapter's base model exists only on this machine, so nobody else could load it; "
                "use --what merged"
            )
    prompts = run.settings.share_prompts if share_prompts is None else share_prompts
    report = shared_report(run, prompts=prompts)
    card = model_card(ReportData(run), report.text, repository=repo, what=what)
    files: dict[str, bytes | Path] = {"README.md": card.encode()}
    files |= {run.paths.report.name: report.html.encode(), run.paths.report_text.name: report.text.encode()}
    files |= {f"figures/{file.name}": file for file in sorted(run.paths.figures.glob("*.svg"))}
    files |= {file.name: file for file in sorted((scratch / what).iterdir()) if file.name != "README.md"}
    if not prompts:
        parity = json.loads((scratch / what / PARITY).read_text(encoding="utf-8"))
        files[PARITY] = json.dumps({name: each for name, each in parity.items() if name != "answers"}).encode()
    if pickled := [name for name in files if name.endswith(_PICKLED)]:
        raise BadInput(f"{run.paths.best}: contains {', '.join(pickled)}; only safetensors are published")
    return files


def _check(run: Run, *, anyway: bool) -> None:
    findings = run.audit.findings if run.audit else []
    errors = sorted({finding.rule for finding in findings if finding.level == "error"})
    if errors and not anyway:
        raise BadInput(
            f"{run.root}: the audit found errors ({', '.join(errors)}; see {run.paths.report}); use --anyway to "
            "publish the run all the same"
        )
    if pickled := [file.name for file in run.paths.best.iterdir() if file.suffix in _PICKLED]:
        raise BadInput(f"{run.paths.best}: contains {', '.join(pickled)}; only safetensors are published")


@contextmanager
def _explaining(repo: str) -> Iterator[None]:
    """Turn the Hub's errors into one line each."""
    try:
        yield
    except HFValidationError as error:
        raise BadInput(f"--repo {repo}: is not a repository name (USER/NAME)") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        advice = _ADVICE.get(status, "try again; uploaded files are not sent twice")
        wait = error.response.headers.get("Retry-After") if error.response is not None else None
        answer = f"the Hub answered {status}{f' (wait {wait} s)' if wait else ''}"
        said = f"--repo {repo}: {answer}; {advice}. Nothing was published"
        raise (BadInput if status in _USER_ERRORS else RunFailed)(said) from error
    except Exception as error:
        raise RunFailed(
            f"--repo {repo}: the Hub cannot be reached ({one_line(error, 120)}); nothing was published, try again"
        ) from error
