"""`lzy completion`: the shell's side of completing commands, image names and pids with tab."""

from __future__ import annotations

import click

# Click's own script, but for names with an @: bash takes that for the end of a word (it is one of
# COMP_WORDBREAKS, for the sake of user@host), so that NAME@3 comes in three parts, of which only
# the last is replaced. Here they are put together again, and what stands already is cut off.
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local -a words=("${COMP_WORDS[0]}")
    local at last=0 word response completion type value

    for ((at = 1; at <= COMP_CWORD; at++)); do
        word=${COMP_WORDS[at]}
        if [[ $word == @ || ( -n $word && ${COMP_WORDS[at-1]} == @ ) ]]; then
            words[last]+=$word
        else
            words[++last]=$word
        fi
    done
    local typed=${words[last]}
    local standing=${typed%%"${typed##*@}"}
    [[ $typed == *@* && $COMP_WORDBREAKS == *@* ]] || standing=

    response=$(env COMP_WORDS="${words[*]}" COMP_CWORD=$last %(complete_var)s=bash_complete $1)

    for completion in $response; do
        IFS=',' read type value <<< "$completion"
        if [[ $type == dir ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == file ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == plain ]]; then
            COMPREPLY+=("${value#"$standing"}")
        fi
    done
    return 0
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


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

    found = get_completion_class(shell)
    assert found is not None
    writer = found(lzy, {}, "lzy", "_LZY_COMPLETE")
    click.echo(_BASH % writer.source_vars() if shell == "bash" else writer.source())
