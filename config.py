"""KEYS: name, type, default, unit, range and meaning of every configuration key."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """One configuration key. ``low``/``high`` are inclusive bounds, ``above`` an exclusive one."""

    name: str
    type: type
    default: object
    group: str
    help: str
    unit: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple = ()

    def describe(self) -> str:
        """Meaning, choices, unit and default in one line."""
        text = self.help
        if self.choices:
            text += f" [{' | '.join(map(str, self.choices))}]"
        unit = f" {self.unit}" if self.unit else ""
        default = str(self.default).lower() if self.type is bool else (self.default if self.default != "" else "empty")
        return f"{text} (default {default}{unit})"


def _table(*rows) -> dict[str, Key]:
    return {key.name: key for group, keys in rows for key in (Key(k[0], k[1], k[2], group, k[3], **k[4]) for k in keys)}


def _k(name, type_, default, text, **more):
    return name, type_, default, text, more


KEYS = _table(
    (
        "Run",
        [
            _k("config", str, "", "YAML file with any of these keys"),
            _k("save_path", str, "exps/exp1", "folder of the run: model/, result/, logs/, debug_nan/"),
            _k("initial_model", str, "", "checkpoint to start from, or to evaluate with --eval"),
            _k(
                "allow_partial",
                bool,
                False,
                "start from an initial_model that fits only in part, or whose features are changed on purpose",
            ),
            _k("eval", bool, False, "evaluate initial_model on the trials and stop"),
            _k("preflight", bool, False, "look at the data, the keys, the plug-ins and one step of training, and stop"),
            _k("seed", int, 10, "seed of every random draw", low=0, high=2**62),
            _k(
                "device",
                str,
                "auto",
                "where to compute; auto takes a GPU if there is one",
                choices=("auto", "cpu", "cuda"),
            ),
            _k("gpu_id", int, 0, "index of the GPU for a single process", low=0),
            _k("distributed", bool, False, "start one process for each GPU of this machine (torchrun does this too)"),
            _k("port", str, "auto", "port for the processes that `distributed` starts; auto takes a free one"),
            _k(
                "process_timeout",
                float,
                30.0,
                "time after which a process that waits for the others gives up",
                unit="minutes",
                above=0,
            ),
            _k("find_unused_parameters", bool, False, "several processes: let a model leave parameters unused"),
            _k("threads", int, 0, "CPU threads for the model, 0 leaves it to torch", low=0),
            _k("allow_unknown", bool, False, "ignore unknown keys of old files instead of refusing them"),
        ],
    ),
    (
        "Data",
        [
            _k("train_list", str, "data/train_list.txt", "train list, lines 'speaker path'"),
            _k("train_path", str, "data/voxceleb2", "folder that the paths of train_list are relative to"),
            _k("test_list", str, "data/test_list.txt", "trial list, lines 'label pathA pathB'"),
            _k("test_path", str, "data/voxceleb1", "folder that the paths of test_list are relative to"),
            _k("musan_path", str, "", "MUSAN noise files, folders noise/, speech/ and music/ at any depth"),
            _k("rir_path", str, "", "room impulse responses, wav files at any depth"),
            _k(
                "channel",
                str,
                "mix",
                "of recordings with several channels: their mean, a channel, or the one of the most energy",
                choices=("mix", "1", "2", "loudest"),
            ),
            _k("augment", bool, False, "add noise or reverberation to the training crops"),
            _k(
                "augment_prob",
                float,
                0.8,
                "share of crops that are augmented, by one of the kinds at hand",
                low=0,
                high=1,
            ),
            _k("speed_perturb", bool, False, "add 0.9x and 1.1x speed copies of each speaker as new speakers"),
            _k("max_frames", int, 200, "length of a training crop", unit="frames of 10 ms", low=10),
            _k("max_seg_per_spk", int, 500, "utterances used of one speaker in an epoch", low=1),
            _k("batch_size", int, 200, "rows in a batch of one process", low=1),
            _k("nPerSpeaker", int, 1, "utterances of one speaker in a row, for losses that compare utterances", low=1),
            _k("nClasses", int, 0, "speakers of the classifier; 0 counts those of train_list", low=0),
            _k("nDataLoaderThread", int, 5, "processes that load audio; 0 loads in the main process", low=0),
            _k("prefetch_factor", int, 3, "batches each loader process prepares ahead", low=1),
            _k(
                "loader_timeout",
                float,
                600.0,
                "time without a batch after which hanging loader processes are ended and started again, 0 is off",
                unit="s",
                low=0,
            ),
            _k("persistent_workers", bool, True, "keep the loader processes between epochs"),
            _k("pin_memory", bool, True, "load batches into page-locked memory where there is a GPU"),
            _k(
                "max_bad_files_pct",
                float,
                1.0,
                "bad files, of all processes, before the run ends; 3 files are always allowed, none if this is 0",
                unit="% of the list",
                low=0,
                high=100,
            ),
        ],
    ),
    (
        "Model and loss",
        [
            _k("model", str, "", "file name in models/"),
            _k("trainfunc", str, "", "file name in loss/"),
            _k("nOut", int, 512, "size of the embedding", low=1),
            _k(
                "encoder_type",
                str,
                "SAP",
                "temporal pooling of the ResNetSE models, SAP or ASP; of VGGVox TAP or MAX too; of RawNet3 ECA or ASP",
            ),
            _k("n_mels", int, 40, "mel filters", low=1),
            _k("log_input", bool, False, "take the logarithm of the mel spectrogram (ResNetSE models, VGGVox)"),
            _k("sinc_stride", int, 10, "stride of the filters of raw-waveform models", low=1),
            _k("margin", float, 0.1, "margin of the loss", unit="(aamsoftmax: rad)"),
            _k("scale", float, 30.0, "scale of the loss", above=0),
            _k("hard_prob", float, 0.5, "share of triplets that take a hard negative", low=0, high=1),
            _k("hard_rank", int, 10, "how many of the hardest negatives a triplet chooses from", low=1),
        ],
    ),
    (
        "Optimisation",
        [
            _k("optimizer", str, "adam", "file name in optimizer/"),
            _k("scheduler", str, "steplr", "file name in scheduler/"),
            _k("lr", float, 0.001, "learning rate", above=0),
            _k(
                "lr_reference_batch",
                int,
                0,
                "multiply lr and lr_min by (processes x batch_size x gradient_accumulation_steps) / this, 0 is off",
                low=0,
            ),
            _k("backbone_lr_factor", float, 1.0, "factor of the learning rate for the model", above=0),
            _k("head_lr_factor", float, 1.0, "factor of the learning rate for the loss's weights", above=0),
            _k("freeze_epochs", int, 0, "first epochs in which only the loss's weights train", low=0),
            _k(
                "ema_decay",
                float,
                0.0,
                "evaluate an exponential moving average of the weights with this decay, as 0.999; 0 is off",
                low=0,
                high=0.9999999,
            ),
            _k("lr_decay", float, 0.95, "factor of the learning rate in a step of steplr", above=0, high=1),
            _k("weight_decay", float, 0.0, "weight decay", low=0),
            _k("max_epoch", int, 500, "epochs", low=1),
            _k("gradient_accumulation_steps", int, 1, "batches summed up before a step", low=1),
            _k("grad_clip", float, 5.0, "largest gradient norm, 0 is off", low=0),
            _k("mixedprec", bool, False, "compute in 16 bit where it is safe (autocast)"),
            _k(
                "amp_dtype",
                str,
                "auto",
                "type of mixedprec; auto: bfloat16 if the device has instructions for it, else float16 (GPU) or none",
                choices=("auto", "float16", "bfloat16"),
            ),
            _k("compile_model", bool, False, "compile the model with torch.compile"),
            _k(
                "log_interval",
                int,
                100,
                "steps between points (loss, gradient norm, rate, speed) in TensorBoard and metrics.jsonl, 0 is none",
                low=0,
            ),
            _k("tracker", str, "", "send points, figures and pictures there too", choices=("", "wandb", "mlflow")),
            _k("enable_profiling", bool, False, "profile steps 10 to 20 into logs/"),
            _k("nan_max_dumps", int, 10, "dumps of non-finite steps in a run", low=0),
            _k("nan_max_gb", float, 1.0, "size of debug_nan/", unit="GB", low=0),
            _k("nan_dump_audio", bool, True, "keep the waveforms in a dump; voices are biometric data"),
            _k("nan_inject", str, "", "rehearsal: spoil steps: 1:data,2:loss,3:grad,4:buffer,5:label,6:update"),
            _k("nan_patience", int, 50, "non-finite steps in a row that end the run (exit status 3)", low=1),
        ],
    ),
    (
        "Evaluation and saving",
        [
            _k("test_interval", int, 10, "epochs between evaluations", low=1),
            _k("patience", int, 10, "evaluations without a better EER before the run stops, 0 is off", low=0),
            _k(
                "eval_frames",
                int,
                300,
                "length of an evaluation crop, 0 takes the whole file",
                unit="frames of 10 ms",
                low=0,
            ),
            _k("num_eval", int, 10, "crops of a file, evenly spaced, where eval_frames is not 0", low=1),
            _k(
                "embed_window_seconds",
                float,
                300.0,
                "a recording longer than this is embedded in overlapping windows of it, whose mean counts; 0 is never",
                unit="s",
                low=0,
            ),
            _k("eval_batch_size", int, 32, "files in an evaluation batch; cannot change a score", low=1),
            _k(
                "max_test_pairs",
                int,
                0,
                "evaluate so many random trials, half targets, of every speaker its share; 0 is all",
                low=0,
            ),
            _k(
                "score_mode",
                str,
                "cosine",
                "cosine, or minus the mean distance of crops",
                choices=("cosine", "euclidean"),
            ),
            _k(
                "picture_format",
                str,
                "png",
                "pictures of the evaluation in this form too, beside png",
                choices=("png", "pdf", "svg"),
            ),
            _k("dcf_p_target", float, 0.05, "prior of a target trial in minDCF and actDCF", above=0, high=0.999999),
            _k("dcf_c_miss", float, 1.0, "cost of a miss", above=0),
            _k("dcf_c_fa", float, 1.0, "cost of a false alarm", above=0),
            _k(
                "max_nan_score_pct",
                float,
                5.0,
                "non-finite scores above which an evaluation fails",
                unit="%",
                low=0,
                high=100,
            ),
            _k(
                "save_interval_steps",
                int,
                0,
                "steps between saves of model/last.model inside an epoch, 0 is off",
                low=0,
            ),
            _k("save_interval_minutes", float, 0.0, "minutes between saves inside an epoch, 0 is off", low=0),
        ],
    ),
)

# Keys that a model or loss may use; setting one that no chosen plug-in takes is worth a note.
MODEL_KEYS = {
    *("encoder_type", "n_mels", "log_input", "sinc_stride", "margin", "scale", "hard_prob", "hard_rank", "nOut"),
    *("lr_decay", "weight_decay"),
}

ALIASES = {
    "loss": "trainfunc",
    "n_cpu": "nDataLoaderThread",
    "test_step": "test_interval",
    "nLcasses": "nClasses",
    "gpu": "gpu_id",
    "num_workers_persistent": "persistent_workers",
}

_NO_TEACHER = "training from a teacher model is not part of this trainer; remove the key"
REFUSED = {
    **dict.fromkeys(
        ("teacher_model", "teacher_checkpoint", "distillation_alpha", "distillation_temperature", "distillation_type"),
        _NO_TEACHER,
    ),
    "freeze_teacher": _NO_TEACHER,
    "save_every_epoch": "set test_interval: 1 for a checkpoint at each epoch; model/last.model is always written",
    "score_save_epoch": "the scores of the newest evaluation are always in result/trials_epoch_N.txt; remove the key",
}
