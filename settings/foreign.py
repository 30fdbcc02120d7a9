"""Configuration files of other toolkits: whose they are, and what to begin with here."""

from errors import UsageError

# Keys by which a file is known, and the files here that say the same.
TOOLKITS = {
    "wespeaker": ({"dataset_args", "model_args"}, "configs/recipes/wespeaker_*.yaml or configs/ResNet34_AAM.yaml"),
    "3D-Speaker": ({"feature_extractor", "embedding_model"}, "configs/recipes/3dspeaker_*.yaml"),
    "NeMo": ({"trainer", "exp_manager"}, "configs/ECAPA_TDNN_AAM.yaml"),
}
# SpeechBrain's HyperPyYAML makes objects by tags.
TAGS = ("!new:", "!name:", "!apply:", "!ref", "!PLACEHOLDER", "!include:")


def refuse_foreign(path: str, names, tags):
    """UsageError if a file with keys of these names, and values with these YAML tags, is of another toolkit."""
    toolkit = next((who for who, (keys, _) in TOOLKITS.items() if keys <= set(names)), "")
    files = TOOLKITS[toolkit][1] if toolkit else ""
    if any(tag.startswith(TAGS) for tag in tags):
        toolkit, files = "SpeechBrain", "configs/recipes/speechbrain_ecapa1024.yaml"
    if toolkit:
        raise UsageError(
            f"{path}: a configuration of {toolkit}, whose keys are others; begin with {files} (docs/recipes.md)"
        )
