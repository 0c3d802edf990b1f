"""Commands that let people talk to models: in the terminal, over an API, and in the site."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pairtune.cli.common import loading, share_processors
from pairtune.errors import BadInput
from pairtune.extras import require
from pairtune.open_data import check_choice
from pairtune.screen import screen

serving_app = typer.Typer()


@serving_app.command()
def chat(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A finished run folder, or a model.")],
) -> None:
    """Chat with a tuned model in the terminal; /base and /tuned switch between models."""
    with loading():
        from pairtune.serve.terminal import chat

    chat(target, screen())


Served = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN|MODEL]...", help="Finished runs, adapters or models; default: every run in --runs."),
]
RunsRoot = Annotated[Path, typer.Option("--runs", help="Folder of the runs to show.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests that one model answers at once.")]
Waiting = Annotated[int, typer.Option(min=1, help="Further requests that may wait in the queue.")]
Context = Annotated[int, typer.Option(min=64, help="Maximum tokens of a conversation, answer included.")]


@serving_app.command()
def worker(
    targets: Served = None,
    runs: RunsRoot = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API.")] = 8001,
    concurrency: Concurrency = 8,
    waiting: Waiting = 64,
    context: Context = 4096,
    attached: Annotated[bool, typer.Option("--attached", hidden=True, help="Exit when standard input closes.")] = False,
) -> None:
    """Serve only the models, over OpenAI's API (/v1/chat/completions); `serve` starts a worker of its own."""
    require("serve", "pairtune worker")
    share_processors(give_way=False)

    from pairtune.serve.request import Limits
    from pairtune.serve.worker import run_worker

    run_worker(
        targets or [], None if targets else runs, host, port, Limits(concurrency, waiting, context), attached=attached
    )


@serving_app.command()
def serve(
    targets: Served = None,
    runs: RunsRoot = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; on any but the default, people enter with keys that it shows.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the site.")] = 8000,
    backend: Annotated[
        str | None, typer.Option(help="OpenAI-style server to use instead: vLLM, llama.cpp, Ollama.")
    ] = None,
    concurrency: Concurrency = 8,
    waiting: Waiting = 64,
    context: Context = 4096,
    matches: Annotated[
        str, typer.Option(help="Who meets in the arena: informative, where a vote tells most, or uniform, by lot.")
    ] = "informative",
    cert: Annotated[Path | None, typer.Option(help="TLS certificate (PEM), to encrypt the connection.")] = None,
    key: Annotated[Path | None, typer.Option(help="The certificate's private key (PEM).")] = None,
    new_keys: Annotated[
        bool, typer.Option("--new-keys", help="With --host: replace the keys by which people enter.")
    ] = False,
) -> None:
    """Start the site at http://localhost:8000/: chat with tuned models, watch runs, look at pairs."""
    require("serve", "pairtune serve")
    check_choice("--matches", matches, ("informative", "uniform"))
    os.environ["PAIRTUNE_MATCHES"] = matches
    from pairtune.web.server import serve

    if (cert is None) != (key is None):
        raise BadInput("--cert and --key: belong together; give both")
    limits = {"--concurrency": concurrency, "--waiting": waiting, "--context": context}
    options = [part for flag, value in limits.items() for part in (flag, str(value))]
    tls = (cert, key) if cert and key else None
    serve(targets or [], runs, host, port, backend, options, tls, new_keys)
