"""The one table of configuration keys: name, type, default, meaning, unit and range. Change a default here.

``Config`` is the table as a class with a typed attribute for each key: a type checker knows ``config.nClasses`` as int
and refuses ``config.nClases``. The reader, --help, --print_config and docs/configuration.md are made from ``KEYS``.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

SAMPLE_RATE = 16000  # Hz, of all audio once it is read, unless the key ``sample_rate`` says another

Value = TypeVar("Value", bool, int, float, str, list)


@dataclass(frozen=True)
class Key:
    """One configuration key. ``low`` and ``high`` are inclusive bounds, ``above`` is an exclusive one.

    A value is a ``multiple`` of a whole number.

    ``switch``: the choices that false and true stand for, of a key that was a bool once; () of others.
    """

    name: str
    type: type
    default: Any
    group: str
    help: str
    unit: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    multiple: int = 1
    choices: tuple[str, ...] = ()
    switch: tuple[str, ...] = ()

    def describe(self) -> str:
        """Meaning, choices, unit and default in one line."""
        text = self.help
        if self.choices:
            text += f" [{' | '.join(map(str, self.choices))}]"
        unit = f" {self.unit}" if self.unit else ""
        default = (
            str(self.default).lower() if self.type is bool else "empty" if self.default in ("", []) else self.default
        )
        return f"{text} (default {default}{unit})"


def key(
    default: Value,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    multiple: int = 1,
    choices: tuple[str, ...] = (),
    switch: tuple[str, ...] = (),
) -> Value:
    """Make a row of the table: a ``Key`` that has its name, type and group from the place where it is written.

    A type checker is told that it is a value, since an instance of ``Config`` has the value in this attribute.
    """
    return cast(Value, Key("", object, default, "", help, unit, low, above, high, multiple, choices, switch))


# fmt: off
class Run:
    config: str = key("", "YAML file with any of these keys")
    save_path: str = key("exps/exp1", "folder of the run: model/, result/, logs/, debug_nan/")
    initial_model: str = key("", "checkpoint to start from, or to evaluate with --eval")
    allow_partial: bool = key(False, "start from an initial_model that fits only in part, or whose features are changed on purpose")
    eval: bool = key(False, "evaluate initial_model on the trials and stop")
    preflight: bool = key(False, "check data, keys and plug-ins, try one step of training, and stop")
    seed: int = key(10, "seed of every random draw", low=0, high=2**62)
    device: str = key("auto", "where to compute; auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))
    gpu_id: int = key(0, "index of the GPU for a single process", low=0)
    distributed: bool = key(False, "start one process for each GPU of this machine (torchrun does this too)")
    port: str = key("auto", "port for the processes that `distributed` starts; auto takes a free one")
    process_timeout: float = key(30.0, "time after which a process that waits for the others gives up", unit="minutes", above=0)
    find_unused_parameters: bool = key(False, "several processes: let a model leave parameters unused")
    sync_batchnorm: bool = key(False, "several processes: BatchNorm takes the statistics of the rows of all of them, so that they give what one gives")
    fsdp: bool = key(False, "several processes: each keeps a share of the weights, gradients and moments (torch's FSDP2), for models that fill the memory of a GPU; the same results")
    ddp_compress: str = key("none", "several processes: send gradients in 16 bit, half the bytes", choices=("none", "bf16", "fp16"))
    deterministic: bool = key(False, "take kernels that give the same bits in every run, on a GPU too; slower, and an operation that has none ends the run")
    float32_matmul: str = key("highest", "precision of fp32 matrix products of training: on a GPU high is TF32, medium bfloat16; a processor may take bfloat16 for medium; evaluations are exact", choices=("highest", "high", "medium"))
    threads: int = key(0, "CPU threads for the model, 0 leaves it to torch", low=0)
    allow_unknown: bool = key(False, "ignore unknown keys of old files instead of refusing them")


class Data:
    train_list: str = key("data/train_list.txt", "train list, lines 'speaker path'; or several, [a.txt, {list: b.txt, root: FOLDER, weight: 2, prefix: b-}]")
    train_path: str = key("data/voxceleb2", "folder that the paths of train_list are relative to")
    train_pack: str = key("", "folder of pack_data.py that has the files of train_list: they are read from it, with the same results")
    test_list: str = key("data/test_list.txt", "trial list, lines 'label pathA pathB'; or several by name, {O: a.txt, E: {list: b.txt, root: FOLDER}}")
    best_list: str = key("", "of several trial lists the one whose EER decides which model is the best; empty is the first")
    test_path: str = key("data/voxceleb1", "folder that the paths of test_list are relative to")
    musan_path: str = key("", "MUSAN noise files, folders noise/, speech/ and music/ at any depth")
    rir_path: str = key("", "room impulse responses, wav files at any depth")
    sample_rate: int = key(SAMPLE_RATE, "rate that all audio is brought to and the model works at, as 8000 for telephony", unit="Hz", low=8000, high=48000, multiple=25)
    channel: str = key("mix", "of recordings with several channels: their mean, a channel, or the one of the most energy", choices=("mix", "1", "2", "loudest"))
    vad: str = key("none", "of whole recordings that are evaluated, embedded, enrolled or verified: keep the speech alone, found by energy or by the network of silero-vad; training crops are as they are", choices=("none", "energy", "silero"))
    augment: bool = key(False, "add noise or reverberation to the training crops")
    augment_prob: float = key(0.8, "share of crops that are augmented, by one of the kinds at hand", low=0, high=1)
    augmentation: list = key([], "policy in the place of augment and augment_prob: a list as [{noise: {p: 0.4, snr: [0, 15]}}, {telephone: {p: 0.1}}] of plug-ins of augmentation/, see docs/data.md")
    augment_cache: str = key("", "folder for noise and impulse responses in one memory-mapped file, made once; empty is noise_cache/ beside save_path, none reads their own files")
    augment_on: str = key("worker", "where crops are augmented: worker, in the loader processes; device, there noise is mixed and reverberation convolved for the whole batch, for a GPU that waits for few CPU cores", choices=("worker", "device"))
    mixup: float = key(0.0, "mix each training waveform with another of its batch, and their losses, by a share of Beta(mixup, mixup), as 0.2; 0 is off", low=0, high=100)
    speed_perturb: bool = key(False, "add 0.9x and 1.1x speed copies of each speaker as new speakers")
    max_frames: int = key(200, "length of a training crop", unit="frames of 10 ms", low=10)
    max_seg_per_spk: int = key(500, "utterances used of one speaker in an epoch", low=1)
    sampling: str = key("count", "a speaker's share of an epoch: by its count of utterances, by the square root of that, or the same for each", choices=("count", "sqrt", "uniform"))
    batch_size: int = key(200, "rows in a batch of one process", low=1)
    nPerSpeaker: int = key(1, "utterances of one speaker in a row, for losses that compare utterances", low=1)
    nClasses: int = key(0, "speakers of the classifier; 0 counts those of train_list", low=0)
    nDataLoaderThread: int = key(5, "processes that load audio; 0 loads in the main process", low=0)
    prefetch_factor: int = key(3, "batches each loader process prepares ahead", low=1)
    loader_timeout: float = key(600.0, "time without a batch after which hanging loader processes are ended and started again, 0 is off", unit="s", low=0)
    persistent_workers: bool = key(True, "keep the loader processes between epochs")
    pin_memory: bool = key(True, "load batches into page-locked memory where there is a GPU")
    max_bad_files_pct: float = key(1.0, "bad files, of all processes, before the run ends; 3 files are always allowed, none if this is 0", unit="% of the list", low=0, high=100)


class ModelAndLoss:
    model: str = key("", "file name in models/")
    trainfunc: str = key("", "file name in loss/")
    nOut: int = key(512, "size of the embedding", low=1)
    encoder_type: str = key("SAP", "temporal pooling of the ResNetSE models, SAP or ASP; of VGGVox TAP or MAX too; of RawNet3 ECA or ASP")
    frontend: str = key("", "file name in frontend/ that computes the features; empty is the model's own")
    n_mels: int = key(40, "mel filters", low=1)
    log_input: bool = key(False, "take the logarithm of the mel spectrogram (ResNetSE models, VGGVox)")
    sinc_stride: int = key(10, "stride of the filters of raw-waveform models", low=1)
    margin: float = key(0.1, "margin of the loss", unit="(aamsoftmax: rad)")
    scale: float = key(30.0, "scale of the loss", above=0)
    class_parallel: bool = key(False, "several processes: split the classes of the loss over them, for very many classes; the same results")
    class_sample_rate: float = key(1.0, "share of the other classes that a row is compared with, drawn anew for each batch; 1 is all", above=0, high=1)
    hard_prob: float = key(0.5, "share of triplets that take a hard negative", low=0, high=1)
    hard_rank: int = key(10, "how many of the hardest negatives a triplet chooses from", low=1)


class Teacher:
    teacher_checkpoint: str = key("", "trained model whose embeddings or classes this one learns to give: a checkpoint of this trainer, or of another toolkit with teacher_config; empty is none")
    teacher_model: str = key("", "file name in models/ of the teacher; empty is what its checkpoint or teacher_config says")
    teacher_config: str = key("", "YAML file with the teacher's keys, where its checkpoint carries none, as those of configs/interop/")
    distillation_type: str = key("cosine", "what the student is compared with: the teacher's embeddings, the logits of its classes, or both", choices=("cosine", "logits", "both"))
    distillation_alpha: float = key(0.5, "weight of that in the loss; the student's own loss has 1 - this", above=0, high=1)
    distillation_temperature: float = key(4.0, "what logits are divided by before they are compared", above=0, high=1000)
    freeze_teacher: bool = key(True, "the teacher does not train along; false is refused")


class Optimisation:
    optimizer: str = key("adam", "file name in optimizer/")
    scheduler: str = key("steplr", "file name in scheduler/")
    lr: float = key(0.001, "learning rate", above=0)
    lr_reference_batch: int = key(0, "multiply lr and lr_min by (processes x batch_size x gradient_accumulation_steps) / this, 0 is off", low=0)
    backbone_lr_factor: float = key(1.0, "factor of the learning rate for the model", above=0)
    frontend_lr_factor: float = key(1.0, "factor that comes to backbone_lr_factor for the weights of a front end that learns", above=0)
    head_lr_factor: float = key(1.0, "factor of the learning rate for the loss's weights", above=0)
    freeze_epochs: int = key(0, "first epochs in which only the loss's weights train", low=0)
    freeze_norms: bool = key(False, "the model's norms keep the running statistics that they start with, as for fine-tuning on few people")
    ema_decay: float = key(0.0, "evaluate an exponential moving average of the weights with this decay, as 0.999; 0 is off", low=0, high=0.9999999)
    lr_decay: float = key(0.95, "factor of the learning rate in a step of steplr", above=0, high=1)
    weight_decay: float = key(0.0, "weight decay", low=0)
    max_epoch: int = key(500, "epochs", low=1)
    gradient_accumulation_steps: int = key(1, "batches summed up before a step", low=1)
    grad_clip: float = key(5.0, "largest gradient norm, 0 is off", low=0)
    mixedprec: bool = key(False, "compute in 16 bit where it is safe (autocast)")
    amp_dtype: str = key("auto", "type of mixedprec; auto: bfloat16 if the device has instructions for it, else float16 (GPU) or none", choices=("auto", "float16", "bfloat16"))
    compile_model: str = key("off", "compile the model with torch.compile, which takes minutes once; auto goes on without if that fails; true is on, false is off", choices=("off", "on", "auto"), switch=("off", "on"))
    memory_format: str = key("auto", "order in memory in which 2-D convolutions of the model train; auto takes channels_last where it is known to be faster and no less exact: in 16 bit on a CPU with AVX512, by models that say so", choices=("auto", "contiguous", "channels_last"))
    gradient_checkpointing: bool = key(False, "compute the blocks of the model again in the backward pass instead of keeping their activations: less memory, the same results")
    log_interval: int = key(100, "steps between points (loss, gradient norm, rate, speed) in TensorBoard and metrics.jsonl, 0 is none", low=0)
    tracker: str = key("", "send points, figures and pictures there too", choices=("", "wandb", "mlflow"))
    enable_profiling: bool = key(False, "profile steps 10 to 20 of this call: a table by module in logs/profile.txt, and a trace")
    nan_max_dumps: int = key(10, "dumps of non-finite steps in a run", low=0)
    nan_max_gb: float = key(1.0, "size of debug_nan/", unit="GB", low=0)
    nan_dump_audio: bool = key(True, "keep the waveforms in a dump; voices are biometric data")
    nan_dump_spikes: bool = key(False, "dump steps that are finite and far above those before them, 3 a run, for analyze_nan_debug.py")
    nan_inject: str = key("", "rehearsal: spoil these steps of the run, counted from 1, refused ones too: 1:data,2:loss,3:grad,4:buffer,5:label,6:update")
    nan_check: str = key("auto", "when a step is known to be good: now, before the next begins, or late, while the next computes, so that the device is not waited for; auto is late on a GPU", choices=("auto", "now", "late"))
    nan_recheck: str = key("same", "compute a step that is not finite once more, to tell a transient fault from a lasting one; cpu: and then on the CPU, to tell a broken GPU; true is same, false is none", choices=("none", "same", "cpu"), switch=("none", "same"))
    nan_patience: int = key(50, "non-finite steps in a row that end the run (exit status 3)", low=1)


class EvaluationAndSaving:
    test_interval: int = key(10, "epochs between evaluations", low=1)
    patience: int = key(10, "evaluations without a better EER before the run stops, 0 is off", low=0)
    eval_frames: int = key(300, "length of an evaluation crop, 0 takes the whole file", unit="frames of 10 ms", low=0)
    num_eval: int = key(10, "crops of a file, evenly spaced, where eval_frames is not 0", low=1)
    embed_window_seconds: float = key(300.0, "a recording longer than this is embedded in overlapping windows of it, whose mean counts; 0 is never", unit="s", low=0)
    eval_batch_size: int = key(32, "files in an evaluation batch; cannot change a score", low=1)
    max_test_pairs: int = key(0, "evaluate so many random trials, half targets, of every speaker its share; 0 is all", low=0)
    score_mode: str = key("cosine", "cosine, or minus the mean distance of crops", choices=("cosine", "euclidean"))
    picture_format: str = key("png", "pictures of the evaluation in this form too, beside png; none draws no pictures", choices=("png", "pdf", "svg", "none"))
    dcf_p_target: float = key(0.05, "prior of a target trial in minDCF and actDCF", above=0, high=0.999999)
    dcf_c_miss: float = key(1.0, "cost of a miss", above=0)
    dcf_c_fa: float = key(1.0, "cost of a false alarm", above=0)
    max_nan_score_pct: float = key(5.0, "non-finite scores above which an evaluation fails", unit="%", low=0, high=100)
    save_interval_steps: int = key(0, "steps between saves of model/last.model inside an epoch, 0 is off", low=0)
    save_interval_minutes: float = key(0.0, "minutes between saves inside an epoch, 0 is off", low=0)
    keep_checkpoints: int = key(0, "newest model0*.model of evaluated epochs that are kept, 0 keeps all", low=0)
# fmt: on


class Config(Run, Data, ModelAndLoss, Teacher, Optimisation, EvaluationAndSaving):
    """Resolved configuration: one attribute for each key of the table, and one for each key of the chosen plug-ins."""

    def __init__(self, **values):
        """Take the ``values`` of keys of the table and of plug-ins; the other keys of the table have their defaults."""
        vars(self).update({name: key.default for name, key in KEYS.items()}, **values)

    def values(self) -> dict[str, Any]:
        """All keys and values as a plain dict, in table order, plug-in keys last."""
        return dict(vars(self))


def frame_samples(rate: int) -> tuple[int, int]:
    """Samples between frames of features, 10 ms, and of their windows, 25 ms, in whole samples as Kaldi counts them."""
    return rate // 100, rate // 40


GROUPS = {
    "Run": Run,
    "Data": Data,
    "Model and loss": ModelAndLoss,
    "Teacher": Teacher,
    "Optimisation": Optimisation,
    "Evaluation and saving": EvaluationAndSaving,
}


def _table() -> dict[str, Key]:
    """Collect the rows of all groups, {name: Key} in the order in which they are written."""
    table = {}
    for group, rows in GROUPS.items():
        for name, kind in inspect.get_annotations(rows).items():
            table[name] = replace(vars(rows)[name], name=name, type=kind, group=group)
    return table


KEYS = _table()

# Keys that a plug-in may use. One that is set and that no chosen plug-in takes is worth a note.
_OF_NO_PLUG_IN = {"model", "trainfunc", "frontend", "class_parallel", "class_sample_rate"}
MODEL_KEYS = set(inspect.get_annotations(ModelAndLoss)) - _OF_NO_PLUG_IN | {"lr_decay", "weight_decay"}

ALIASES = {
    "loss": "trainfunc",
    "n_cpu": "nDataLoaderThread",
    "test_step": "test_interval",
    "nLcasses": "nClasses",
    "gpu": "gpu_id",
    "num_workers_persistent": "persistent_workers",
}

REFUSED = {
    "save_every_epoch": "set test_interval: 1 for a checkpoint at each epoch; model/last.model is always written",
    "score_save_epoch": "the scores of the newest evaluation are always in result/trials_epoch_N.txt; remove the key",
}
