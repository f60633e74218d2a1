"""`variform publish`: a trained model to the Hub, proved before it goes."""

import argparse
import sys

from rich.console import Console

EXAMPLES = """\
examples:
  variform publish runs/g2p --dry-run                             what would go, and does it load elsewhere
  variform publish runs/g2p --dry-run --folder published          the same, kept in a folder
  variform publish runs/g2p --repo-id me/g2p --private
  variform publish runs/my-llama --repo-id me/my-llama --native llama
  variform publish runs/lora --repo-id me/my-adapter --base-model me/my-base

docs/publishing.md says what goes, what stays, and what is checked."""
DESCRIPTION = """\
Publish a trained model. The repo is assembled in a folder of its own, from an allow-list: weights, config, tokenizer, the
model's code, card, figures and plots. Its tensors are checked for NaN, its files for pickles. Then a new process, in which
Variform cannot be imported, loads it and must compute what the run's model computes. Only then is it uploaded; what was cut
off can be run again."""


def add_publish(commands: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "publish",
        help="assemble, prove and upload a trained model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    parser.add_argument("model", metavar="RUN", help="the output folder of a run, or any saved model or adapter")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="the repo on the Hub; made if it does not exist")
    parser.add_argument("--dry-run", action="store_true", help="do everything but upload")
    parser.add_argument("--folder", metavar="DIR", help="keep the assembled repo in a folder that does not exist yet")
    parser.add_argument("--private", action="store_true", default=None, help="a new repo is private")
    parser.add_argument(
        "--native", metavar="MODEL_TYPE", help="publish as a native class, such as llama: no code of ours"
    )
    parser.add_argument("--revision", metavar="BRANCH", help="upload to a branch, made if it does not exist")
    parser.add_argument("--base-model", metavar="REPO", help="of an adapter, the repo of the model that it adapts")
    parser.add_argument("--yes", action="store_true", help="upload without asking")
    parser.set_defaults(run=run_publish)


def run_publish(options: argparse.Namespace, console: Console) -> int:
    """Publishes; returns the exit status."""
    from ..hub.publish import publish  # loads torch: not for `variform --help`

    try:
        publish(
            options.model,
            options.repo_id,
            folder=options.folder,
            dry_run=options.dry_run,
            native=options.native,
            private=options.private,
            revision=options.revision,
            base_model=options.base_model,
            confirm=lambda question: options.yes or ask(question),
            console=console,
        )
    except RuntimeError as error:  # the model, not the command, is at fault
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def ask(question: str) -> bool:
    """Whether somebody at the terminal says yes; nobody does where there is none."""
    if not sys.stdin.isatty():
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
