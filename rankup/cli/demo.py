"""`rankup demo`: all of Rankup on one machine, with real parts: server, dataset, three volunteers, two rounds, a pull,
a verify and a question. Volunteers are processes of their own that know nothing but the URL and the invite."""

from __future__ import annotations

from pathlib import Path

import typer

PRESETS = {
    "smollm2": {"steps": 10, "batch_size": 4, "max_tokens": 96, "rank": 8, "learning_rate": 1e-3, "warmup_steps": 1},
    "tiny": {"steps": 20, "batch_size": 8, "max_tokens": 96, "rank": 4, "learning_rate": 1e-2},
}


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    model: str = typer.Option(
        "smollm2", "--model", "--base", help="smollm2, tiny, a hub id, a local folder or a GGUF file."
    ),
    rounds: int = typer.Option(2, min=1, max=20, help="Rounds to run."),
    volunteers: int = typer.Option(None, min=1, max=16, help="Volunteer processes; default: 3, for tiny 2."),
    keep: Path = typer.Option(
        None, "--keep", help="Folder to keep state, versions and logs in; default: all is removed."
    ),
    question: str = typer.Option(
        "What does `os.path.join` do in Python?", help="Asked of version 0 and of the latest."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON; progress goes to stderr."),
) -> None:
    """Run a real community round on this machine, end to end, and show what came out.

    **Examples**

    - `rankup demo` (SmolLM2-135M, some minutes on two cores)
    - `rankup demo --model tiny` (a small random model, under a minute)
    - `rankup demo --base ./my-model --rounds 1 --keep ./demo`
    """
    import tempfile

    from rankup.cli.demo_report import print_report, report_json
    from rankup.cli.demo_run import run_demo
    from rankup.cli.interrupt import interruptible
    from rankup.cli.output import print_json
    from rankup.recipe import Recipe

    recipe = Recipe.model_validate(PRESETS.get(model, PRESETS["smollm2"]))
    with tempfile.TemporaryDirectory(prefix="rankup-demo-", ignore_cleanup_errors=True) as scratch, interruptible():
        home = (keep or Path(scratch)).resolve()
        home.mkdir(parents=True, exist_ok=True)
        crowd = volunteers or (2 if model == "tiny" else 3)
        result = run_demo(home, base=model, recipe=recipe, rounds=rounds, volunteers=crowd, question=question)
    if as_json:
        print_json(report_json(result))
    else:
        print_report(result)
    if not result.good:
        raise typer.Exit(1)
