"""What a plug-in file says of itself is found through every form that such files have."""

import pytest
from samples import SMALL, VALUES

from settings import plugins
from settings.declarations import UNKNOWN, declaration_in

NET = """
class Net:
    per_speaker = (2, 2)
    def __init__(self, nOut, levels=2, **kwargs):
        self.levels = levels
class Block:
    def __init__(self, stride=1):
        self.stride = stride
"""
FORMS = {
    "another name": NET + "MainModel = Net\n",
    "another name with a type": NET + "MainModel: type = Net\n",
    "a class without __init__": NET + "class MainModel(Net):\n    pass\n",
    "a class that hands on": NET
    + "class MainModel(Net):\n    def __init__(self, **kwargs):\n        super().__init__(**kwargs)\n",
    "a lambda": NET + "MainModel = lambda **kwargs: Net(**kwargs)\n",
    "a function": NET + "def MainModel(*args, **kwargs):\n    return Net(*args, **kwargs)\n",
    "behind an if": NET + "if True:\n    def MainModel(**kwargs):\n        return Net(**kwargs)\n",
    "behind a try": NET + "try:\n    import absent\nexcept ImportError:\n    MainModel = Net\n",
    "read from kwargs": "def MainModel(**kwargs):\n    return kwargs['nOut'], kwargs.get('levels', 2)\n",
    "imported under its name": "from models.Nets import Net as MainModel\n",
    "of an imported class": "from models.Nets import Net\nclass MainModel(Net):\n    pass\n",
    "handed to an import": "from models.Nets import Net\ndef MainModel(**kwargs):\n    return Net(**kwargs)\n",
    "handed to a module": "import models.Nets as nets\ndef MainModel(**kwargs):\n    return nets.Net(**kwargs)\n",
    "handed to a whole name": "import models.Nets\ndef MainModel(**kwargs):\n    return models.Nets.Net(**kwargs)\n",
    "handed to one beside": "from . import Nets\ndef MainModel(**kwargs):\n    return Nets.Net(**kwargs)\n",
    "a partial": "import functools\nfrom models.Nets import Net\nMainModel = functools.partial(Net, wide=3)\n",
}


def declare(folder, text):
    (folder / "models").mkdir()
    (folder / "models" / "Nets.py").write_text(NET)
    (folder / "models" / "theirs.py").write_text(text)
    return declaration_in(folder / "models" / "theirs.py", "MainModel", folder)


@pytest.mark.parametrize("form", FORMS)
def test_the_keys_of_every_form_are_found(tmp_path, form):
    found = declare(tmp_path, FORMS[form])
    assert found.keys["levels"] == 2 and found.keys["nOut"] is UNKNOWN
    if "class MainModel(Net)" in FORMS[form] or " MainModel = Net" in FORMS[form]:
        assert found.constants == {"per_speaker": (2, 2)}


def test_a_partial_fixes_what_it_gives(tmp_path):
    text = "from functools import partial\nfrom models.Nets import Net\nMainModel = partial(Net, nOut=8, levels=5)\n"
    found = declare(tmp_path, text)
    assert found.own == {"nOut": 8, "levels": 5} and not found.required


def test_arguments_that_go_nowhere_take_no_keys_of_classes_beside(tmp_path):
    found = declare(tmp_path, NET + "def MainModel(nOut=3, **kwargs):\n    return Block()\n")
    assert found.keys == {"nOut": 3}


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nMainModel = torch.nn.Identity\n",
        "from absent import MainModel\n",
        "MainModel = Other\nOther = MainModel\n",
        "from models.theirs import MainModel\n",
        "class MainModel(MainModel):\n    pass\n",
    ],
)
def test_what_is_of_no_file_here_or_stands_for_itself_has_no_keys(tmp_path, text):
    assert declare(tmp_path, text).keys == {}
    assert declaration_in(tmp_path / "models" / "theirs.py", "LossFunction", tmp_path) is None


@pytest.mark.parametrize("folder", ["models", "loss", "optimizer", "scheduler"])
def test_files_built_on_ours_may_hand_on_all_keys(folder):
    import torch

    weights = [torch.nn.Parameter(torch.zeros(2))]
    leading = {"optimizer": [weights], "scheduler": [torch.optim.SGD(weights, lr=0.1)]}.get(folder, [])
    for name in plugins.available(folder):
        values = {**VALUES, **SMALL.get(name, {}), "hard_rank": 2, "train_list": "list.txt", "of_another": 1}
        values.update(encoder_type="ECA" if name == "RawNet3" else "ASP", n_mels=72 if "ReDimNet" in name else 40)
        assert plugins.load(folder, name)(*leading, **values) is not None
