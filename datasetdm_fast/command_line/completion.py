"""datasetdm-fast completion SHELL: what makes bash, zsh or fish complete the commands, their flags and values."""

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module

from datasetdm_fast.command_line.flags import DESCRIBE
from datasetdm_fast.errors import Refused, nearest

SCRIPT = "datasetdm-fast"
Commands = Mapping[str, tuple[str, str]]  # name -> module with its main, what it does
Flags = Mapping[str, Sequence["DescribedFlag"]]  # of each command


@dataclass(frozen=True)
class DescribedFlag:
    """A flag as shells know it: its spellings, whether a value follows, and the values it may have."""

    names: tuple[str, ...]
    takes_value: bool
    values: tuple[str, ...]
    help: str


def completion(shell: str, commands: Commands) -> str:
    """The script that a shell reads; another shell's name is refused."""
    if shell not in SHELLS:
        given = f"no shell is called {shell!r}{nearest(shell, SHELLS)}" if shell else "no shell is named"
        raise Refused(f"{SCRIPT} completion: {given}", f"Write one of {', '.join(SHELLS)}.")
    return SHELLS[shell](commands, {name: flags_of_command(module) for name, (module, _) in commands.items()})


def flags_of_command(module: str) -> list[DescribedFlag]:
    """The flags of a command, as it describes them itself."""
    described = io.StringIO()
    with redirect_stdout(described):
        import_module(module).main([DESCRIBE])
    found = []
    for entry in json.loads(described.getvalue()):
        inner = re.fullmatch(r"\{(.*)\}", entry["metavar"])
        values = tuple(inner[1].split(",")) if inner else ()
        if entry["flags"]:
            found.append(DescribedFlag(tuple(entry["flags"]), entry["takes"], values, entry["help"]))
    return found


def bash(commands: Commands, described: Flags) -> str:
    flags = "".join(
        f"        {name}) flags='{' '.join(word for flag in found for word in flag.names)}' ;;\n"
        for name, found in described.items()
    )
    values = "".join(
        f"        {name}:{word}) COMPREPLY=($(compgen -W '{' '.join(flag.values)}' -- \"$word\")); return ;;\n"
        for name, found in described.items()
        for flag in found
        if flag.values
        for word in flag.names
    )
    return f"""_datasetdm_fast() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}" flags=
    if [ "$COMP_CWORD" = 1 ]; then
        COMPREPLY=($(compgen -W '{" ".join(commands)} --help --version' -- "$word")); return
    fi
    case "$command:$before" in
{values}    esac
    case "$command" in
{flags}    esac
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
}}
complete -o default -F _datasetdm_fast {SCRIPT}
"""


def zsh(commands: Commands, described: Flags) -> str:
    cases = ""
    for name, found in described.items():
        lines = []
        for flag in found:
            value = f":value:({' '.join(flag.values)})" if flag.values else ":value:_files" if flag.takes_value else ""
            lines += [_quoted(f"{word}[{_plain(flag.help)}]{value}") for word in flag.names]
        cases += f"        {name}) _arguments {' '.join(lines)} '*:file:_files' ;;\n"
    names = " ".join(_quoted(f"{name}:{_plain(commands[name][1])}") for name in commands)
    return f"""#compdef {SCRIPT}
_datasetdm_fast() {{
    local -a commands=({names})
    if (( CURRENT == 2 )); then _describe command commands; return; fi
    local command=$words[2]
    shift words; (( CURRENT-- ))
    case $command in
{cases}    esac
}}
compdef _datasetdm_fast {SCRIPT}
"""


def fish(commands: Commands, described: Flags) -> str:
    lines = [
        f"complete -c {SCRIPT} -n __fish_use_subcommand -f -a {name} -d {_quoted(_plain(commands[name][1]))}"
        for name in commands
    ]
    for name, found in described.items():
        for flag in found:
            value = f" -x -a {_quoted(' '.join(flag.values))}" if flag.values else " -r" if flag.takes_value else ""
            lines += [
                f"complete -c {SCRIPT} -n '__fish_seen_subcommand_from {name}' -l {word[2:]}{value} "
                f"-d {_quoted(_plain(flag.help))}"
                for word in flag.names
            ]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Help without what the shells give a meaning to."""
    return re.sub(r"[\[\]:'\"\\`$]", "", text)


def _quoted(text: str) -> str:
    return f"'{text}'"


SHELLS: dict[str, Callable[[Commands, Flags], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
