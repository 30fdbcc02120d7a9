"""Checks across keys that need the lists and folders but nothing slow."""

import math
import os
from pathlib import Path

import numpy as np

from config import KEYS, Config
from corpus.audio import class_count
from corpus.list_forms import why_no_list
from corpus.lists import MANY_FILES, none_below, read_trials
from corpus.sources import shown, train_sources, trial_sources
from corpus.tars import ENDING, shards_of
from corpus.train_list import read_train_lists
from errors import Mistakes, UsageError, no_file, no_folder, plural, suggested
from settings import plugins, policy
from settings.injections import parse_injections


def check_paths(config: Config, written: dict):
    """Check lists, folders, classes, batch size and loss against each other.

    UsageError with all mistakes, a line each, which names the key and its place.
    """
    mistakes = Mistakes()

    def refuse(key, text, entry=None):
        place = f"{written[key].where}: {key}" if key in written and not written[key].from_command_line else None
        if place and entry is not None:
            place = policy.place_of(place, written[key].lines, entry)
        place = place or (f"command line: --{key}" if key in written else key)
        raise UsageError(f"{place}: {text}")

    def passes(key, fault: str) -> bool:
        with mistakes.collected():
            if fault:
                refuse(key, fault)
        return not fault

    with mistakes.collected():
        check_save_path(config.save_path, refuse)
    names = [source.name for source in trial_sources(config)]
    with mistakes.collected():
        if config.best_list and config.best_list not in names:
            known = f"one of {', '.join(names)}" if names[0] else "a name, and test_list gives none"
            refuse("best_list", f"must be {known}; got '{config.best_list}'")
    for source in trial_sources(config):
        owner = root_key(config, "test", source)
        both = passes("test_list", no_file(source.path)), passes(owner, no_folder(source.root))
        with mistakes.collected():
            if both[0]:
                _, first, second = read_trials(source.path)
            if all(both):
                check_files(source.path, source.root, owner, sorted(set(first) | set(second)), refuse)
    if config.initial_model:
        passes("initial_model", no_file(config.initial_model))
    if config.eval:
        with mistakes.collected():
            if not config.initial_model:
                refuse("initial_model", f"eval needs a checkpoint to evaluate; {best_model(config.save_path)}")
    else:
        check_training(config, passes, refuse, mistakes)
    mistakes.refuse()


def best_model(save_path: str) -> str:
    """Say where a run keeps its best model, and how to evaluate it if it is there."""
    path = Path(save_path, "model", "model_best.model")
    if path.is_file():
        return f"to evaluate the best of this run: --initial_model {path}"
    return f"a run keeps its best one as SAVE_PATH/model/model_best.model, and {path} is not there"


def check_training(config: Config, passes, refuse, mistakes: Mistakes):
    """Check the train list and what depends on it, and which steps are to be spoiled."""
    with mistakes.collected():
        try:
            parse_injections(config.nan_inject, world=int(os.environ.get("WORLD_SIZE", "1")))
        except UsageError as error:
            refuse("nan_inject", str(error).partition(": ")[2])
    with mistakes.collected():
        if config.sync_batchnorm and config.compile_model != "off":
            refuse("sync_batchnorm", "a compiled model cannot wait for other processes in it; set compile_model: off")
    with mistakes.collected():
        check_teacher(config, passes, refuse)
    check_fsdp(config, refuse, mistakes)
    sources, listed = train_sources(config), None
    both = []
    for source in sources:
        there = passes("train_list", why_no_list(source.path))
        there = (not source.pack or passes("train_pack", no_folder(source.pack))) and there
        apart = source.pack or source.path.endswith(ENDING) or (there and shards_of(source.path))  # not below the root
        both.append((there, apart or passes(root_key(config, "train", source), no_folder(source.root))))
    with mistakes.collected():
        if all(there for there, _ in both):
            listed = read_train_lists(sources)
            listed.open_packs()
            for (source, numbers), (_, folder) in zip(listed.by_source(), both):
                if folder and not (source.pack or shards_of(source.path)):
                    sample = [listed.paths[i] for i in numbers[:: max(1, len(numbers) // MANY_FILES)]]
                    check_files(source.path, source.root, root_key(config, "train", source), sample, refuse)
    if listed is not None:
        utterances = np.bincount(listed.labels)
        for check in (check_classes, check_rows, check_margin, check_mixup, check_class_weights):
            with mistakes.collected():
                check(config, utterances, refuse)
        config.nClasses = config.nClasses or class_count(len(utterances), config.speed_perturb)
    if config.augment:
        folders = {key: getattr(config, key) for key in ("musan_path", "rir_path")}
        there = [passes(key, no_folder(path)) for key, path in folders.items() if path]
        with mistakes.collected():
            if all(there):
                check_augmentation(config, refuse)


def check_teacher(config: Config, passes, refuse):
    """Check that the keys of a teacher go together, and that its files are there."""
    if not config.teacher_checkpoint:
        for key in ("teacher_model", "teacher_config"):
            if getattr(config, key):
                refuse(key, "a teacher needs its weights: set teacher_checkpoint, or leave this key out")
        return
    if passes("teacher_checkpoint", no_file(config.teacher_checkpoint)) and written_by_run(config):
        refuse(
            "teacher_checkpoint",
            f"'{config.teacher_checkpoint}' is a checkpoint of this very run (save_path: {config.save_path}), which "
            "writes it anew while it learns from it; copy it elsewhere, or give the run another save_path",
        )
    passes("teacher_config", no_file(config.teacher_config) if config.teacher_config else "")
    if not config.freeze_teacher:
        refuse("freeze_teacher", "false: a teacher that trains along comes to give what its student does; leave it out")
    if config.teacher_model and plugins.declaration("models", config.teacher_model) is None:
        meant = suggested(config.teacher_model, plugins.available("models"))
        refuse("teacher_model", f"no plug-in 'models/{config.teacher_model}.py'{meant}")
    kind = config.distillation_type
    for key in ("class_parallel", "class_sample_rate") if kind != "cosine" else ():
        if getattr(config, key) != KEYS[key].default:
            text = f"{kind} compares all classes, but {key} leaves a process some; cosine compares embeddings alone"
            refuse("distillation_type", text)
    if kind == "cosine" and config.distillation_alpha == 1 and config.freeze_epochs:
        refuse("freeze_epochs", "trains the loss's weights alone, and distillation_alpha 1 leaves them out of the loss")


def written_by_run(config: Config) -> bool:
    """Whether ``teacher_checkpoint`` is one of the files that the run itself writes, by whatever path it is named."""
    teacher = Path(os.path.realpath(config.teacher_checkpoint))
    own = teacher.name.startswith(("last", "model_best.", "model0")) and teacher.suffix in (".model", ".safetensors")
    return own and teacher.parent == Path(os.path.realpath(config.save_path)) / "model"


def root_key(config: Config, kind: str, source) -> str:
    """The key whose value the root of a list is: train_path or test_path, or that of a list with a root of its own."""
    return f"{kind}_path" if source.root == getattr(config, f"{kind}_path") else f"{kind}_list"


def check_save_path(save_path, refuse):
    """Refuse a folder that cannot be written, before anything is computed for it."""
    folder = Path(save_path)
    inside = [folder / name for name in ("model", "result", "logs")]
    for path in [
        next((p for p in (folder, *folder.parents) if os.path.exists(p)), folder),
        *filter(os.path.exists, inside),
    ]:
        if not os.path.isdir(path):
            refuse("save_path", f"'{path}' is not a folder")
        if not os.access(path, os.W_OK | os.X_OK):
            refuse("save_path", f"'{path}' cannot be written")


def check_files(list_path, root, key, paths, refuse):
    """Refuse a list none of whose files is below ``root``; single missing files are found by the loader."""
    if fault := none_below(root, list_path, paths):
        refuse(key, fault)


def check_classes(config: Config, utterances, refuse):
    """Check a given ``nClasses`` against the train list; ``utterances`` (speakers,) of each."""
    classes = class_count(len(utterances), config.speed_perturb)
    if config.nClasses and config.nClasses < classes:
        refuse(
            "nClasses",
            f"{config.nClasses} is fewer than the {classes} classes of {shown(config.train_list)}; 0 counts them",
        )


def check_rows(config: Config, utterances, refuse):
    """Check ``nPerSpeaker`` and ``batch_size`` against what the loss compares and what the speakers have."""
    low, high = plugins.known_declaration("loss", config.trainfunc).constants.get("per_speaker", (1, None))
    if config.nPerSpeaker < low or (high is not None and config.nPerSpeaker > high):
        wanted = f"{'' if high == low else 'at least '}{plural(low, 'utterance')}"
        refuse("nPerSpeaker", f"loss '{config.trainfunc}' (trainfunc) takes {wanted} a row, not {config.nPerSpeaker}")
    most = min(int(utterances.max()), config.max_seg_per_spk)
    if config.nPerSpeaker > most:
        owner = (
            "max_seg_per_spk allows"
            if most == config.max_seg_per_spk
            else f"any speaker of {shown(config.train_list)} has"
        )
        refuse("nPerSpeaker", f"{config.nPerSpeaker} utterances a row, more than {owner} ({most})")
    if config.nPerSpeaker > 1 and config.batch_size > len(utterances):
        speakers = f"{shown(config.train_list)} has {len(utterances)}"
        refuse("batch_size", f"{config.batch_size} rows of different speakers, but {speakers}")
    if len(utterances) < 2:
        refuse("train_list", "needs utterances of at least 2 speakers")


def check_margin(config: Config, utterances, refuse):
    """Check ``margin`` against the range that the loss declares."""
    loss = plugins.known_declaration("loss", config.trainfunc)
    low, high = loss.constants.get("margin_range", (-math.inf, math.inf))
    if "margin" in loss.keys and not low <= config.margin <= high:
        limits = f"takes a margin from {low:g} to {high:g}; 0.1 to 0.5 is usual"
        refuse("margin", f"{config.margin:g}: loss '{config.trainfunc}' (trainfunc) {limits}")


def check_mixup(config: Config, utterances, refuse):
    """Check that a row has one utterance, and so one label, if rows are mixed."""
    if config.mixup and config.nPerSpeaker > 1:
        refuse("mixup", f"mixes rows of one utterance, but nPerSpeaker is {config.nPerSpeaker}")


def check_class_weights(config: Config, utterances, refuse):
    """Check that a loss whose classes are to be split or drawn says which of its weights have a row for each."""
    asked = {"class_parallel": config.class_parallel, "class_sample_rate": config.class_sample_rate < 1}
    able = [n for n in plugins.available("loss") if "class_weights" in plugins.known_declaration("loss", n).constants]
    for key in [key for key, wanted in asked.items() if wanted and config.trainfunc not in able]:
        text = f"loss '{config.trainfunc}' (trainfunc) has no class weights that can be split or drawn; these have"
        refuse(key, f"{text}: {', '.join(able)} (docs/extending.md)")
    others = (config.nClasses or class_count(len(utterances), config.speed_perturb)) - 1
    if others and config.class_sample_rate * others < 1:
        rate, least = config.class_sample_rate, 1 / others
        text = f"{rate:g} draws {rate * others:.2g} of {others} other classes, and without any nothing is learnt"
        refuse("class_sample_rate", f"{text}; take at least {least:.2g}")


def check_fsdp(config: Config, refuse, mistakes: Mistakes):
    """Check that no key is set beside ``fsdp`` which splits, compiles or sends weights in a way of its own."""
    others = {
        "class_parallel": config.class_parallel,
        "class_sample_rate": config.class_sample_rate < 1,
        "compile_model": config.compile_model != "off",
        "ddp_compress": config.ddp_compress != "none",
    }
    for key in [key for key, is_set in others.items() if is_set and config.fsdp]:
        with mistakes.collected():
            refuse("fsdp", f"cannot be combined with {key}; remove one of them")


def check_augmentation(config: Config, refuse):
    """Check that there is something to augment with, in every category."""
    if not config.musan_path and not config.rir_path and not config.augmentation:
        refuse("augment", "needs musan_path or rir_path")
    from corpus.augmentation import AugmentWAV

    try:
        with plugins.explained("augmentation"):
            where, rate = (config.musan_path, config.rir_path), config.sample_rate
            augmenter = AugmentWAV(*where, policy=config.augmentation, sample_rate=rate)
            augmenter.try_out()
    except UsageError as error:
        key, text = str(error).split(": ", 1)
        refuse(key, text, getattr(error, "entry", None))
        return
    host_only, others = augmenter.host_only()
    if config.augment_on == "device" and not others:
        text = f"nothing of the policy can be done there, only by the loader processes: {', '.join(host_only)}"
        refuse("augment_on", f"device: {text}; take worker")
