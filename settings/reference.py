"""The reference page of the keys: `python -m settings.reference > docs/configuration.md`."""

from config import ALIASES, KEYS, REFUSED
from errors import write_any_text
from settings import plugins


def _yaml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def reference_page() -> str:
    """Make docs/configuration.md."""
    lines = [
        "# Configuration keys",
        "",
        "Made from `config.py` by `python -m settings.reference > docs/configuration.md`.",
        "Every key can stand in the YAML file and on the command line (`--key value`); the command line wins.",
        "A key not listed here that is a keyword argument of the chosen plug-in file is legal too and reaches it.",
        "All mistakes of the keys are said at once, each in a line that names the file and line or the flag; if there",
        "are none, all of the lists and folders.",
    ]
    group = None
    for key in KEYS.values():
        if key.group != group:
            group = key.group
            lines += ["", f"## {group}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        default = str(key.default).lower() if key.type is bool else "" if key.default == [] else key.default
        text = (
            key.help + (f" ({', '.join(key.choices)})" if key.choices else "") + (f"; {key.unit}" if key.unit else "")
        )
        text = text.replace("|", "\\|")
        lines.append(f"| `{key.name}` | {key.type.__name__} | {f'`{default}`' if default != '' else ''} | {text} |")
    lines += ["", "## Keys of the plug-ins", "", "Legal while the plug-in is chosen; with their defaults.", ""]
    for folder in plugins.CHOSEN_BY:
        for name in plugins.available(folder):
            own = {k: v for k, v in plugins.known_declaration(folder, name).own.items() if k not in KEYS}
            own = {k: v for k, v in own.items() if v is not plugins.UNKNOWN}
            if own:
                lines.append(f"- `{folder}/{name}.py`: " + ", ".join(f"`{k}: {_yaml(v)}`" for k, v in own.items()))
    lines += ["", "## Old names", "", "Read with a warning:", ""]
    lines += [f"- `{old}` is `{new}`" for old, new in ALIASES.items()]
    lines += ["", "Refused unless it is false, with the reason:", ""]
    lines += [f"- `{name}`: {reason}" for name, reason in REFUSED.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    write_any_text()
    print(reference_page())
