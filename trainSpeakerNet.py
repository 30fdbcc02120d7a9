"""Train a speaker-verification model from a YAML configuration, or evaluate one.

python trainSpeakerNet.py --config configs/demo.yaml                                        # CPU or one GPU
torchrun --nproc_per_node 2 trainSpeakerNet.py --config configs/ResNet34_AAM.yaml           # several processes
python trainSpeakerNet.py --config configs/demo.yaml --eval --initial_model exps/demo/model/model_best.model
"""

import os
import signal
import sys
import time

from errors import Finished, SharedError, UsageError, plural, shell_path, write_any_text
from settings.command_line import complain, need, outlast_full_disks
from settings.plugins import explained
from settings.reader import table_defaults, to_yaml
from training.start import configure


def main(argv=None) -> int:
    """Run the command line; returns the exit status, which docs/training.md explains."""
    write_any_text()
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, written, notes, print_config = configure(argv)
    except UsageError as error:
        status = complain(error, argv)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from training.ranks import tell_the_others

            tell_the_others(str(error))
        return status
    if print_config:
        print(to_yaml(config.values()), end="")
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(note, file=sys.stderr if print_config else sys.stdout)
    try:
        return 0 if print_config else run(config, argv, written)
    except UsageError as error:
        error.of_one_process = True
        status = complain(error, argv)
        if isinstance(error, SharedError) and os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # torchrun ends all processes when the first ends; the main one is to say the error before
        return status


def run(config, argv, written) -> int:
    """Train, evaluate, or only look at everything, with a checked configuration."""
    drawn = [] if config.picture_format == "none" else ["matplotlib"]
    need("trainSpeakerNet.py", *drawn, *([] if config.eval else ["tensorboard"]))
    import torch

    from training.allocator import keep_freed_memory
    from training.meeting import alone_in_one_line
    from training.precision import choose_kernels
    from training.ranks import Ranks, launch_all_gpus
    from training.run_lock import held

    if not config.preflight:
        launch_all_gpus(config, [__file__, *argv])
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        raise SharedError("preflight: runs in one process, without torchrun")
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    choose_kernels(config)
    ranks = Ranks(config)
    if config.preflight:
        return preflight(config, written, ranks)
    with explained(), held(config.save_path, ranks), alone_in_one_line(ranks, config.save_path):
        status = evaluate(config, ranks) if config.eval else train(config, written, ranks)
    ranks.close()  # not after an exception: the other processes may wait in a collective, and this would wait too
    return status


def train(config, written, ranks) -> int:
    """Train, or continue a run."""
    from corpus.lists import trials_hash
    from DatasetLoader import SpeakerBatchSampler, TrainDataset
    from SpeakerNet import ModelTrainer
    from training.agreement import facts_of, failing_together, refuse_differences, weights_hash
    from training.distillation import hash_of_teacher
    from training.evaluation import Evaluator
    from training.run_files import RunFiles

    with failing_together(ranks):
        dataset = TrainDataset(config)
        sampler = SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1, ranks.rank, ranks.world)
        evaluator = Evaluator(config, ranks, dataset.speakers)
        files = RunFiles(config, ranks.main)
        trainer = ModelTrainer(config, ranks, dataset, sampler, evaluator, files)
    refuse_differences(ranks, facts_of(config, dataset))
    trainer.stop_signal.catch()
    describe_run(trainer, written)
    with failing_together(ranks):  # all begin with the one collective of ``resume``
        trainer.begin()
    progress = trainer.progress
    if ranks.world > 1:
        place = {"epoch": progress.epoch, "batch": progress.batch, "step": progress.step}
        own = {**place, "weights": weights_hash(trainer.network, config.initial_model)}
        refuse_differences(ranks, {**own, "teacher": hash_of_teacher(trainer.network)})
    files.write_config(config.values(), {"train_list": dataset.list.hash, "test_list": trials_hash(config)})
    files.track(config)
    status = run_to_the_end(trainer)
    unsaved = ", ".join(trainer.saver.unsaved())
    if unsaved:
        text = "not saved as the run ended; make room and run the same command again: it goes on from the last save"
        print(f"{unsaved}: {text}", file=sys.stderr)
    if not status:
        status = report_end(trainer, bool(unsaved))
    return 4 if unsaved else status


def run_to_the_end(trainer) -> int:
    """Train to the end of the run, or to where it stops; returns the exit status."""
    from SpeakerNet import Interrupted
    from utils import plain_names

    config, progress, status = trainer.config, trainer.progress, 0
    try:
        if progress.epoch > config.max_epoch:
            trainer.log(f"epoch {config.max_epoch} of {config.max_epoch} is already done")
        else:
            trainer.state.refuse_unreadable()
            trainer.stop_early()
        trainer.run()
    except Interrupted as stop:
        number = stop.args[0]
        trainer.log(
            f"stopped by signal {number} ({signal.Signals(number).name}); "
            f"the state is in {trainer.files.model / 'last.model'}; run the same command again to continue"
        )
        status = 128 + number
    except Finished as end:
        for line in end.lines:
            if trainer.ranks.main:
                print(plain_names(line), file=sys.stderr if end.status else sys.stdout)
        status = end.status
    finally:
        trainer.close()
        trainer.files.close()
    return status


def report_end(trainer, unsaved: bool) -> int:
    """Say what a run that reached its end has brought; returns the exit status."""
    from scoring.plots import NAMES
    from training.endings import NO_EER

    files, best = trainer.files, trainer.progress.best
    count = trainer.incidents.left_out
    if count:
        folder = shell_path(trainer.incidents.writer.folder)
        trainer.log(f"left out: {plural(count, 'step')}; to find out why: python analyze_nan_debug.py {folder}")
    if best["eer"] is not None:
        trainer.log(f"best EER {best['eer']:.2f} % at epoch {best['epoch']}: {files.model / 'model_best.model'}")
        if trainer.config.picture_format != "none":
            pictures = [str(files.result / f"{name}.png") for name in NAMES]
            trainer.log(f"pictures: {', '.join(pictures)}")
        if trainer.evaluator.calibrator.caution:
            trainer.log(f"WARNING: {trainer.evaluator.calibrator.caution}")
    elif trainer.progress.step and not unsaved:
        for line in trainer.endings.without_a_best() if trainer.ranks.main else ():
            print(line, file=sys.stderr)
        return NO_EER
    return 0


def preflight(config, written, ranks) -> int:
    """Look at everything before a long run; exit status 0 start it, 2 do not."""
    from preflight.run import run_checks

    def build(log):
        """The trainer as a run would start it, which writes nothing."""
        from DatasetLoader import SpeakerBatchSampler, TrainDataset
        from SpeakerNet import ModelTrainer
        from training.run_files import RunFiles

        dataset = TrainDataset(config)
        sampler = SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1)
        trainer = ModelTrainer(config, ranks, dataset, sampler, None, RunFiles(config, False), log)
        trainer.begin()
        trainer.state.refuse_unreadable()
        return trainer

    return run_checks(config, written, build)


def trials_text(evaluator) -> str:
    """'40 trials', or of several lists 'O 40 trials, E 80 trials'."""
    lists = [evaluator, *evaluator.others]
    return ", ".join(f"{one.source.name} {plural(len(one.labels), 'trial')}".strip() for one in lists)


def describe_run(trainer, written):
    """Print what will be trained."""
    import numpy as np

    from corpus.loader import usable_cores
    from scoring.cautions import known_in
    from training.finetuning import learning_rate_scale
    from training.precision import emulation_note

    c, dataset, sampler = trainer.config, trainer.dataset, trainer.sampler
    size = sum(p.numel() for p in trainer.network.__S__.parameters())
    precision = "float32" if trainer.step.amp_dtype is None else str(trainer.step.amp_dtype).removeprefix("torch.")
    trainer.log(
        f"{c.model} ({size:,} parameters), {c.trainfunc}, {precision} on {trainer.device}, "
        f"{plural(trainer.ranks.world, 'process')}"
    )
    trainer.log(
        f"{len(dataset)} utterances of {len(dataset.speakers)} speakers, {dataset.classes} classes; "
        f"{plural(len(sampler), 'batch')} of up to {c.batch_size} rows an epoch; {trials_text(trainer.evaluator)}"
    )
    for source, numbers in dataset.list.by_source() if dataset.list.parts is not None else ():
        people = len(np.unique(dataset.labels[numbers.start : numbers.stop]))
        trainer.log(f"  {source.path}: {len(numbers)} utterances of {people} speakers, weight {source.weight:g}")
    listed = [(source.root, dataset.list.paths.between(r.start, r.stop)) for source, r in dataset.list.by_source()]
    for text in filter(None, map(dataset.list.read_from, range(len(dataset.list.sources)))):
        trainer.log(text)
    voices = known_in(dataset.speakers, listed, [(trainer.evaluator.root, trainer.evaluator.files)])
    if voices:
        trainer.log(f"WARNING: {voices}")
    emulation = emulation_note(c, trainer.device)
    if emulation:
        trainer.log(f"mixedprec: {emulation}")
    for line in table_defaults(c, written):
        trainer.log(line)
    scale = learning_rate_scale(c, trainer.ranks.world)
    if c.lr_reference_batch:
        rows = round(scale * c.lr_reference_batch)
        sizes = f"{rows} rows a step / lr_reference_batch {c.lr_reference_batch}"
        trainer.log(f"learning rate {scale * c.lr:.4g}: lr {c.lr:g} x {sizes}")
    if c.ema_decay:
        trainer.log(
            f"evaluations and their checkpoints have the moving average of the weights (ema_decay {c.ema_decay})"
        )
    if c.nDataLoaderThread > usable_cores():
        trainer.log(f"nDataLoaderThread: {usable_cores()} instead of {c.nDataLoaderThread}, one for each core here")
    if sampler.surplus:
        trainer.log(f"{sampler.surplus} rows of speakers with more rows than there are batches wait for another epoch")


def evaluate(config, ranks) -> int:
    """Score the trials with ``initial_model``; exit status 1 if too few scores are finite to say an EER."""
    from corpus.sources import trial_sources
    from SpeakerNet import SpeakerNet
    from storage import checkpoint
    from training.agreement import facts_of, failing_together, refuse_differences, weights_hash
    from training.evaluation import Evaluator, describe, write_evaluation
    from training.run_files import RunFiles

    with failing_together(ranks):
        state = checkpoint.load(config.initial_model)
        network = SpeakerNet({**config.values(), "nClasses": max(config.nClasses, 1)}).to(ranks.device)
        checkpoint.load_model_exactly(network, state, config.initial_model, config.model)
        evaluator = Evaluator(config, ranks)
        files = RunFiles(config, ranks.main)
    if ranks.world > 1:
        refuse_differences(ranks, {**facts_of(config), "initial_model": weights_hash(network.__S__)})
    epoch = state.get("epoch") if isinstance(state.get("epoch"), int) else 0
    result = evaluator.run(network, epoch, best=None)
    if ranks.main:
        paths = ", ".join(source.path for source in trial_sources(config))
        print(f"{config.initial_model} on {paths}:")
        for line in describe(result, config):
            print(line)
        step = state.get("step") if isinstance(state.get("step"), int) else 0
        names = ("initial_model", "test_list", "score_mode", "eval_frames", "max_test_pairs")
        result["settings"] = {name: getattr(config, name) for name in names}
        write_evaluation(files, evaluator, result, config, step)
        if not result["failed"]:
            pictures = evaluator.draw(files.result, result, files.writes)
            if pictures:
                print("pictures: " + ", ".join(map(str, pictures)))
            carries = isinstance(state.get("config"), dict)
            for line in evaluator.calibrator.leave(files, network, result, carries):
                print(line)
    files.close()
    return 4 if files.writes.waiting else 1 if result["failed"] else 0


def command() -> int:
    """Run the command line of this process; Ctrl-C before there is a run is status 130."""
    write_any_text()
    outlast_full_disks()
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command())
