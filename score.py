"""Score a trial list: embeddings or a model in, a score file, figures with intervals, pictures and one JSON out.

python score.py --trials trials.txt --embeddings vox1.npz --out exps/scores
python score.py --trials trials.txt --initial_model exps/demo/model/model_best.model --root data/demo/wav
python score.py --trials trials.txt --embeddings all.npz --cohort train_list.txt --norm asnorm --calibrate held_out.txt
python score.py --compare exps/one/scores.txt exps/two/scores.txt --out exps/compared
"""

import functools
import os
import sys

from corpus.lists import read_train_list
from errors import UsageError, plural
from settings.command_line import Parser, check_not_read, existing_file, existing_folder, need, run

BY = "a table by prefix:N, column:N of the list, FILE.tsv:COLUMN or duration:2,4 (needs --root); may be repeated"


def parser() -> Parser:
    """The options, in groups."""
    p = Parser("score.py", __doc__.splitlines()[0])
    add = p.add_argument_group("trials and embeddings").add_argument
    add("--trials", help="'label a b' (VoxCeleb) or 'a b target|nontarget' (Kaldi, wespeaker)")
    add("--embeddings", nargs="+", default=[], metavar="FILE", help="embeddings by name: npz, ark or scp")
    add("--root", default="", help="folder of the audio files that the lists name; durations are read there too")
    add("--durations", default="", metavar="FILE", help="'utterance seconds' lines (utt2dur), for --qmf without --root")
    add(
        "--enroll",
        default="",
        metavar="LIST",
        help="'model utterance ..' lines (spk2utt): the trials name models first",
    )
    add("--enroll_by", choices=("mean", "scores"), default="mean", help="average embeddings or scores (default mean)")
    add("--enroll_weights", choices=("equal", "quality"), default="equal", help="by speech and SNR (needs --root)")
    add = p.add_argument_group("back-end").add_argument
    add("--backend", default="", metavar="FILE", help="a back-end of --save_backend: scores with that chain")
    add("--cohort", default="", metavar="FILE", help="train list 'speaker path', or a file of embeddings")
    add("--cohort_speakers", default="", metavar="LIST", help="'speaker name' list for a cohort given as embeddings")
    add("--cohort_by", choices=("speaker", "utterance"), default="", help="default: speaker where they are known")
    add("--submean", action="store_true", help="subtract the mean of the cohort's utterances from every embedding")
    add("--norm", choices=("none", "snorm", "asnorm"), default="none", help="normalise scores by the cohort")
    add("--top_n", type=int, default=300, help="best cohort scores of each side for asnorm (default 300)")
    add("--train_plda", action="store_true", help="score by PLDA learnt on the cohort, not by cosine")
    add("--lda_dimension", type=int, default=0, help="dimension before PLDA (default: as many as there are)")
    add("--plda", default="", metavar="FILE", help="score by the PLDA of a back-end file")
    add = p.add_argument_group("calibration and fusion, learnt on held-out trials").add_argument
    add("--calibrate", default="", metavar="TRIALS", help="held-out trial list: scores become log-likelihood ratios")
    add("--calibrate_folds", action="store_true", help="learn it on --trials: each by trials of other speakers")
    add("--allow_overlap", action="store_true", help="accept speakers of the evaluation in --calibrate, with a warning")
    add("--qmf", action="store_true", help="calibrate with duration, magnitude and cohort scores too")
    add("--fuse", nargs="+", default=[], metavar="SCORES", help="scores of other systems on --trials, to be fused")
    add("--fuse_calibrate", nargs="+", default=[], metavar="SCORES", help="their scores on --calibrate, same order")
    add = p.add_argument_group("figures and files").add_argument
    add("--p_target", type=float, default=0.05, help="prior of a target trial for calibration and decision (0.05)")
    add("--by", action="append", default=[], metavar="CONDITION", help=BY)
    add("--open_set", action="store_true", help="how often each test is named among all it is compared with")
    add("--draws", type=int, default=0, help="bootstrap draws over speakers (default 0: 200 to 1,000)")
    add("--max_nan_score_pct", type=float, default=5.0, help="non-finite scores above which there is no figure; %% (5)")
    add("--form", choices=("voxceleb", "kaldi", "wespeaker"), default="voxceleb", help="form of the score file")
    add("--out", default="", metavar="FOLDER", help="write scores.txt, result.json and the pictures there")
    add("--save_backend", default="", metavar="FILE", help="write the chain as one .npz, for verify.py and --backend")
    add(
        "--false_accept",
        type=float,
        metavar="RATE",
        help="store the threshold that accepts this share of held-out nontarget trials",
    )
    add("--pictures", nargs="+", default=[], choices=("png", "pdf", "svg"), help="pictures in these forms beside png")
    add = p.add_argument_group("compare two systems").add_argument
    add("--compare", nargs=2, default=[], metavar=("A", "B"), help="score files of the same trials: is one better?")
    add = p.add_argument_group("make a held-out list").add_argument
    add("--make_trials", nargs=2, metavar=("TRAIN_LIST", "TRIALS"), help="draw held-out trials from a train list; stop")
    add("--pairs", type=int, default=10000, help="target trials to draw, and nontarget ones (default 10000)")
    add("--prefix", type=int, default=0, help="nontarget trials of names that share so many first letters (default 0)")
    add("--speakers", type=int, default=0, help="from so many speakers, at random (default: a quarter, at most 500)")
    add("--seed", type=int, default=0, help="seed of the draw (default 0)")
    return p


def checked(p: Parser, argv):
    """Parse and check what can be checked before anything slow."""
    from speaker_model import add_model_arguments

    add_model_arguments(p, required=False)
    a = p.parse_args(argv)
    check_numbers(p, a)
    if a.make_trials:
        existing_file(a.make_trials[0], "--make_trials")
        return a
    if a.compare:
        check_comparison(p, a)
        return a
    if not a.trials:
        p.error("--trials FILE is needed (or --make_trials TRAIN_LIST TRIALS)")
    if a.embeddings and a.initial_model:
        p.error("give --embeddings or --initial_model, not both")
    if not (a.embeddings or a.initial_model or a.fuse):
        p.error("give --embeddings FILE, or --initial_model with --root, or --fuse SCORES")
    if a.enroll_weights == "quality" and not (a.enroll and a.root):
        p.error("--enroll_weights quality needs --enroll, and --root for the audio")
    if a.initial_model and not a.root:
        p.error("--initial_model needs --root, the folder of the audio files")
    for flag in ("root", "trials", "durations", "enroll", "backend", "cohort", "cohort_speakers", "plda", "calibrate"):
        if getattr(a, flag):
            (existing_folder if flag == "root" else existing_file)(getattr(a, flag), f"--{flag}")
    for flag in ("embeddings", "fuse", "fuse_calibrate"):
        for path in getattr(a, flag):
            existing_file(path, f"--{flag}")
    for flag, needs in (("submean", "cohort"), ("train_plda", "cohort")):
        if getattr(a, flag) and not getattr(a, needs):
            p.error(f"--{flag} needs --{needs}")
    for flag in ("qmf", "fuse"):
        if getattr(a, flag) and not (a.calibrate or a.calibrate_folds):
            p.error(f"--{flag} needs --calibrate or --calibrate_folds")
    if a.calibrate and a.calibrate_folds:
        p.error("give --calibrate or --calibrate_folds, not both")
    if a.cohort and not (a.submean or a.train_plda or a.norm != "none"):
        p.error("--cohort is of no use without --submean, --norm or --train_plda")
    if a.norm != "none" and not a.cohort:
        p.error(f"--norm {a.norm} needs --cohort")
    if a.backend and (a.cohort or a.plda or a.enroll_by != "mean"):
        p.error("--backend is a whole chain: it takes no --cohort, --norm, --plda or --enroll_by beside it")
    if a.plda and (a.train_plda or a.submean):
        p.error("--plda has its own training and mean: no --train_plda or --submean beside it")
    if a.save_backend and not a.save_backend.endswith(".npz"):
        p.error(f"--save_backend: '{a.save_backend}' must end in .npz")
    for flag in ("out", "save_backend"):
        if getattr(a, flag):
            check_place(flag, getattr(a, flag), (*a.embeddings, a.cohort, a.plda))
    if not a.root and any(condition.startswith("duration:") for condition in a.by):
        p.error("--by duration needs --root, the folder of the audio files")
    if len(a.fuse_calibrate) != (0 if a.calibrate_folds else len(a.fuse)):
        wanted = "--calibrate_folds takes no --fuse_calibrate" if a.calibrate_folds else ""
        p.error(wanted or "--fuse and --fuse_calibrate take the same systems in the same order")
    if a.fuse and a.save_backend:
        p.error("--save_backend cannot hold the other systems of --fuse")
    if a.out:
        need("score.py --out", "matplotlib")
    return a


def check_comparison(p: Parser, a):
    """UsageError for what --compare cannot be done with."""
    others = ("embeddings", "initial_model", "enroll", "backend", "cohort", "calibrate", "fuse", "by", "save_backend")
    for flag in others:
        if getattr(a, flag):
            p.error(f"--compare takes score files, and no --{flag}")
    for path in a.compare:
        existing_file(path, "--compare")
    if a.trials:
        existing_file(a.trials, "--trials")
    if a.out:
        check_place("out", a.out)


def check_place(flag: str, path: str, read=()):
    """Make the folder of what is to be written, --out itself or that of --save_backend's file; UsageError if not.

    Nor may it be one of the files ``read``.
    """
    check_not_read(f"--{flag}", path, read)
    folder = path if flag == "out" else os.path.dirname(path) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--{flag}: cannot write into '{folder}': {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--{flag}: cannot write into '{folder}': no permission")


def check_numbers(p: Parser, a):
    """UsageError for a number that cannot be."""
    if a.false_accept is not None and not (0 < a.false_accept < 1 and a.save_backend):
        p.error(f"--false_accept RATE lies between 0 and 1 and needs --save_backend, got {a.false_accept:g}")
    if not 0 < a.p_target < 1:
        p.error(f"--p_target must lie between 0 and 1, got {a.p_target:g}")
    at_least = {"top_n": 2, "pairs": 1, "draws": 0, "speakers": 0, "prefix": 0, "lda_dimension": 0, "seed": 0}
    for flag, least in {**at_least, "max_nan_score_pct": 0}.items():
        if not getattr(a, flag) >= least:
            p.error(f"--{flag} must be at least {least}, got {getattr(a, flag)}")


def make_held_out(a) -> int:
    """Write a held-out trial list drawn from a train list."""
    import numpy as np

    from scoring.files import write_trials
    from scoring.held_out import make_trials

    check_not_read("--make_trials", a.make_trials[1], a.make_trials[:1])
    speakers, labels, paths, _ = read_train_list(a.make_trials[0])
    wanted = a.speakers or max(2, min(500, len(speakers) // 4))
    try:
        drawn = make_trials(labels, paths, a.pairs, a.seed, wanted, a.prefix)
    except ValueError as error:
        raise UsageError(f"{a.make_trials[0]}: {error}") from error
    write_trials(a.make_trials[1], *drawn)
    targets = int(np.sum(drawn[0]))
    print(f"{a.make_trials[1]}: {targets} target and {len(drawn[0]) - targets} nontarget trials of {wanted} speakers")
    return 0


def make_source(a):
    """The source of the embeddings."""
    from scoring.sources import Source

    model = None
    if a.initial_model:
        from speaker_model import model_from

        model = model_from(a)
    return Source(a.embeddings, model, a.root, a.durations)


def read_lists(a, say):
    """The trial list, it and the held-out one as [(labels, first, second)], models, all utterances they name."""
    from scoring.files import read_trials_any
    from scoring.held_out import check_held_out
    from scoring.sources import read_enrollment

    columns = any(condition.startswith("column:") for condition in a.by)
    read = [read_trials_any(path, columns=columns and path == a.trials) for path in (a.trials, a.calibrate) if path]
    lists = [(trials.labels, trials.first, trials.second) for trials in read]
    models = read_enrollment(a.enroll) if a.enroll else None
    voices = []
    for _, first, second in lists:
        enrolled = first if models is None else [u for name in dict.fromkeys(first) for u in models.get(name, ())]
        voices.append([*enrolled, *second])
    if a.calibrate:
        warning = check_held_out(a.calibrate, voices[1], a.trials, voices[0], a.allow_overlap)
        if warning:
            say(warning)
    if a.calibrate_folds:
        speakers_of_folds(a, read[0], models)  # before anything slow
    return read[0], lists, models, [name for names in voices for name in names]


def score_lists(a, lists, models, voices, say):
    """(Back-end or None, [scored trials, scored held-out trials]); without embeddings only --fuse gives scores."""
    from scoring.chain import ScoredTrials, build_backend, score_list
    from scoring.files import read_scores

    backend, scored = None, [ScoredTrials.without_scores(*trials) for trials in lists]
    if a.embeddings or a.initial_model:
        source = make_source(a)
        backend = build_backend(a, source, voices, say)
        quality = a.qmf or (backend.calibration is not None and len(backend.calibration.names) > 1)
        scored = [score_list(backend, source, *trials, models, quality, a.enroll_weights) for trials in lists]
        if a.save_backend and (a.calibrate or a.calibrate_folds):
            _, first, second = lists[-1]
            backend.vad = source.vad or "none"  # that of --backend may be another, and its map is learnt anew
            backend.heard = source.heard([*second, *(first if models is None else [])])
            if backend.heard is None:
                say("without --root the back-end cannot know recordings that are unlike those of its calibration")
    for number, paths in enumerate(zip(a.fuse, *([a.fuse_calibrate] if a.calibrate else [])), 1):
        for trials, path in zip(scored, paths):
            theirs = read_scores(path)
            trials.add_system(f"system {number}", dict(zip(zip(theirs.first, theirs.second), theirs.scores)), path)
    return backend, scored


def learn(a, backend, scored, models, say):
    """The calibration: learnt on the held-out trials or all of --calibrate_folds, or that of --backend, or None."""
    from scoring.calibration import LogisticCalibration
    from scoring.cautions import beyond

    if not (a.calibrate or a.calibrate_folds):
        if backend.calibration is not None:
            cautions_of(a, backend, say)
        return backend.calibration
    held_out, path = scored[-1], a.calibrate or a.trials
    good = held_out.finite
    if not good.all():
        say(f"{path}: {(~good).sum()} of {len(good)} trials have no finite score and are left out")
        if a.calibrate:
            describe_problems(held_out, say)
    try:
        found = LogisticCalibration.fit(held_out.features[good], held_out.labels[good], a.p_target, held_out.names)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    if a.calibrate and a.qmf:
        for caution in beyond(found.names, held_out.features[good], scored[0].features[scored[0].finite]):
            say(f"WARNING: {path}: {caution}")
    caution = few_errors_of(held_out, good, models)
    if caution:
        say(f"WARNING: {path}: {caution}: take more trials, or speakers that the model was not trained on")
    if backend:
        backend.caution = caution
    for name, weight in zip(found.names, found.weights):
        if weight < 0 and (name == "score" or name.startswith("system")):
            say(f"WARNING: {path}: the calibration inverts {name} (weight {weight:.3g}): are labels swapped?")
    return found


def cautions_of(a, backend, say):
    """Say why the calibration of --backend may be wrong, or look better than it is."""
    from corpus.lists import list_hash

    for caution in backend.cautions:
        say(f"WARNING: {caution}")
    if backend.test_list_sha256 == list_hash(a.trials):
        say(
            f"WARNING: {a.backend}: its calibration was learnt on these very trials, so the calibrated figures are "
            "better than those of new trials; --calibrate_folds learns and tests on different speakers"
        )


def speakers_in(trials, models):
    """Speakers (N, 2) of scored trials, or None, and why."""
    from scoring.intervals import trial_speakers
    from scoring.report import speakers_of

    return trial_speakers(trials.labels, trials.first, trials.second, speakers_of(models, trials.second))


def speakers_of_folds(a, trials, models, good=slice(None)):
    """Speakers of the ``good`` trials; UsageError if they make no folds."""
    from scoring.calibration import folds_over

    speakers, why = speakers_in(trials, models)
    if speakers is None or folds_over(trials.labels[good], speakers[good]) != "speakers":
        why = why or "so few speakers that a fold lacks target or nontarget trials"
        raise UsageError(f"--calibrate_folds: {a.trials}: {why}; give held-out trials by --calibrate")
    return speakers[good]


def few_errors_of(held_out, good, models) -> str:
    """Why a calibration learnt on the held-out trials is a guess, or "" if it is none."""
    from scoring.cautions import few_errors

    speakers, _ = speakers_in(held_out, models)
    return few_errors(held_out.scores[good], held_out.labels[good], None if speakers is None else speakers[good])


def calibrated(a, calibration, trials):
    """Log-likelihood ratios of the trials; UsageError if --backend wants measures that are not there."""
    try:
        return calibration.llrs(trials.features, trials.names)
    except ValueError as error:
        raise UsageError(f"{a.backend or a.calibrate}: {error}: durations come from --root or --durations") from error


def folded(a, trials, models):
    """Log-likelihood ratios of the trials of --calibrate_folds, as the trainer has them; NaN without a score."""
    import numpy as np

    from scoring.calibration import calibrated_llrs

    good = trials.finite
    labels, speakers = trials.labels[good], speakers_of_folds(a, trials, models, good)
    llrs = np.full(len(good), np.nan)
    llrs[good] = calibrated_llrs(trials.features[good], labels, speakers, a.p_target)
    return llrs


def describe_problems(trials, say):
    """Name each utterance without a score: why, and how many trials it spoils."""
    for name, (reason, spoiled) in list(trials.problems.items())[:10]:
        say(f"{name}: {reason}; spoils {plural(spoiled, 'trial')}")
    if len(trials.problems) > 10:
        say(f"... and {len(trials.problems) - 10} more")


def save(a, backend, calibration, scored, result):
    """Write the back-end with its threshold: of --false_accept, else Bayes if calibrated, else of the EER.

    What --backend read stays as it was if no option of this call says otherwise.
    """
    import numpy as np

    from corpus.lists import list_hash
    from tuneThreshold import threshold_at_false_accept

    if a.calibrate or a.calibrate_folds:
        backend.calibration, backend.prior, backend.threshold = calibration, a.p_target, None
        backend.test_list_sha256 = list_hash(a.calibrate or a.trials)
        backend.crop_seconds = 0.0  # of the calibration of --backend
    learnt = scored[-1]  # the held-out trials, if there are any
    values = learnt.scores if calibration is None else calibrated(a, calibration, learnt)
    good = np.isfinite(values)
    if a.false_accept is not None:
        if len(np.unique(learnt.labels[good])) < 2:
            raise UsageError(
                f"--save_backend: no threshold from {a.calibrate or a.trials}: one class of trials is left"
            )
        backend.threshold = threshold_at_false_accept(values[good], learnt.labels[good], a.false_accept)
    elif calibration is None and backend.threshold is None and result["scores"]["figures"]:
        backend.threshold = result["scores"]["figures"]["threshold"]
    backend.save(a.save_backend)
    print(f"back-end: {a.save_backend}")


def main(argv) -> int:
    """Score a trial list, or draw a held-out one."""
    a = checked(parser(), argv)
    if a.make_trials:
        return make_held_out(a)
    if a.compare:
        from scoring.comparison import main as compare

        return compare(a)
    from scoring import report
    from scoring.conditions import groups_of

    notes = []

    def say(line):
        notes.append(line)
        print(line)

    listed, lists, models, voices = read_lists(a, say)
    groupings = [groups_of(condition, listed, a.root) for condition in a.by]  # before anything slow
    backend, scored = score_lists(a, lists, models, voices, say)
    trials = scored[0]
    calibration = learn(a, backend, scored, models, say) if a.calibrate or a.calibrate_folds or backend else None
    describe_problems(trials, say)
    llrs = None
    if calibration is not None:
        llrs = folded(a, trials, models) if a.calibrate_folds else calibrated(a, calibration, trials)
    parts = [backend.describe()] if backend else []
    parts += [f"fusion with {len(a.fuse)} score file{'s' * (len(a.fuse) > 1)}"] if a.fuse else []
    learnt_on = a.calibrate or "the trials, in folds over speakers" * a.calibrate_folds
    parts += [f"{'QMF ' if a.qmf else ''}calibration on {learnt_on}"] if learnt_on else []
    if a.fuse and calibration is not None:
        weights = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(calibration.names, calibration.weights))
        say(f"fusion: log-likelihood ratio = sum of the weighted scores {calibration.bias:+.4g}; weights: {weights}")
    result = report.summarise(a, trials, llrs, " + ".join(parts), models)
    result["calibration"] = None if calibration is None else calibration.to_dict()
    print("\n".join(report.table(result)))
    failed = any(part and part["failed"] for part in (result["scores"], result["calibrated"]))
    if a.by and not failed:
        print("\n".join(report.by_condition(a, groupings, trials, llrs, models, result)))
    if a.open_set and not failed:
        from scoring.open_set import open_set_figures, open_set_lines

        values = trials.scores if llrs is None else llrs
        result["open_set"] = open_set_figures(trials.labels, trials.second, values, llrs is not None)
        print("\n".join(["", *open_set_lines(result["open_set"])]))
    if backend and a.save_backend:
        save(a, backend, calibration, scored, result)
    if a.out:
        report.write(a, trials, llrs, {**result, "notes": notes})
    return int(failed)


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
