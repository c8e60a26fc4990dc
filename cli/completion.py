"""`lzy completion`: the shell's side of completing commands, image names and pids with tab."""

from __future__ import annotations

import click


@click.command(
    epilog="""\b
    Examples:
      eval "$(lzy completion bash)"                      in ~/.bashrc
      eval "$(lzy completion zsh)"                       in ~/.zshrc
      lzy completion fish > ~/.config/fish/completions/lzy.fish
    """
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes tab complete lzy's commands, options, images and pids."""
    from click.shell_completion import get_completion_class

    from .app import lzy

    writer = get_completion_class(shell)
    assert writer is not None
    click.echo(writer(lzy, {}, "lzy", "_LZY_COMPLETE").source())
