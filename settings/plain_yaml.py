"""YAML that anyone may have written: plain values, not nested deeply, and as small as it looks."""

import yaml

MOST_CHARACTERS = 1 << 20  # of a file; each may cost a hundred bytes
MOST_DEPTH = 32


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader that refuses deep nesting, aliases of lists and mappings, which can multiply, and huge numbers."""

    def __init__(self, text: str):
        if len(text) > MOST_CHARACTERS:
            raise yaml.YAMLError(f"longer than {MOST_CHARACTERS} characters")
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent, index):
        """Compose as a SafeLoader does, within the bounds."""
        event = self.peek_event()
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(
                problem=f"nested more than {MOST_DEPTH} deep", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(event, yaml.AliasEvent) and not isinstance(node, yaml.ScalarNode):
            raise yaml.composer.ComposerError(
                problem="an alias of a list or mapping; write it out", problem_mark=event.start_mark
            )
        return node

    def construct_mapping(self, node, deep=False):
        """A mapping, each of whose keys stands there once: yaml would keep the last without a word."""
        found = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in found:
                problem = f"duplicate key '{key.value}'"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            found.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        """A whole number of at most 64 bits: Python cannot even print one of thousands of digits."""
        value = super().construct_yaml_int(node)
        if not -(2**63) <= value < 2**63:
            raise yaml.constructor.ConstructorError(problem="a number beyond 64 bits", problem_mark=node.start_mark)
        return value


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)


def load(text: str):
    """The value of a YAML text; yaml.YAMLError or ValueError for anything but plain values."""
    return yaml.load(text, PlainLoader)
