"""Learning from a teacher: the loss of a student that follows the embeddings or the classes of a trained model.

The teacher hears the crops that the student hears, augmented and mixed in the same way (Beyer et al. 2022, "Knowledge
distillation: a good teacher is patient and consistent", section 3), and is frozen.
"""

import collections
import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from config import Config
from errors import UsageError, plural
from storage.checkpoint import nonfinite_tensors
from storage.dump import tensor_stats
from training.teacher import Teacher, read_teacher
from utils import cosine_matrix

NAME = "distillation"  # in names of modules: the network's attribute
INSTEAD = "distillation_type: cosine compares embeddings alone"


class Distillation(nn.Module):
    """alpha x distillation + (1 - alpha) x the student's own loss, of a batch.

    ``model``: the teacher's; ``classifier``: its loss, None if its classes are not followed. ``values`` are the
    configuration's, ``facts`` what a dump and a checkpoint tell of the teacher. It is no submodule of the network: what
    walks over that (optimizer, averages, checkpoints, other processes) passes the teacher by.
    """

    def __init__(self, model: nn.Module, classifier: nn.Module | None, values: dict, facts: dict):
        super().__init__()
        self.teacher, self.classifier, self.facts = model, classifier, facts
        self.alpha, self.temperature = values["distillation_alpha"], values["distillation_temperature"]
        self.kind = values["distillation_type"]
        self.eval().requires_grad_(False)
        self.nonfinite_by_design = set(nonfinite_tensors(dict(self.named_buffers())))
        # Of each batch of a step, on its device: the rows of which the teacher's embedding alone is not finite.
        self.bad_rows = collections.deque(maxlen=values.get("gradient_accumulation_steps", 1))

    def forward(self, own, waves, embeddings, head):
        """The loss to train on.

        ``own``: the student's own, a number; ``waves`` (rows, samples), and what the student made of them,
        ``embeddings`` (rows, D); ``head``: its loss, which gives the logits.
        """
        with torch.no_grad():
            taught = self.at(waves).teacher(waves)
            self.bad_rows.append(embeddings.isfinite().all(dim=1) & ~taught.isfinite().all(dim=1))
        with torch.autocast(waves.device.type, enabled=False):
            student, taught = embeddings.float(), taught.float()
            parts = []
            if self.kind != "logits":
                alike = student.shape[1] == taught.shape[1]
                parts.append((embedding_loss if alike else similarity_loss)(student, taught))
            if self.classifier is not None:
                logits = head.class_logits(student), self.classifier.class_logits(taught)
                parts.append(logit_loss(*logits, self.temperature))
            return self.alpha * sum(parts) + (1.0 - self.alpha) * own

    def at(self, waves) -> "Distillation":
        """Bring the teacher to the device and precision of waveforms: it is not moved with the network."""
        held = next((t for t in self.parameters()), None)
        if held is not None and held.device != waves.device:
            self.to(waves.device)
        if held is not None and held.dtype != waves.dtype:  # float64, of a dry step or a replay
            self.double() if waves.dtype is torch.float64 else self.float()
        return self

    def bad_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the teacher that are not finite, by name, though they were when it was loaded."""
        state = self.state_dict()
        return {name: state[name] for name in nonfinite_tensors(state) if name not in self.nonfinite_by_design}

    def rows_at_fault(self, utterances: int) -> list[int]:
        """The rows of the last step, numbers into its ``files``, that are finite to the student and not to the teacher.

        ``utterances``: of a speaker in a row (nPerSpeaker).
        """
        flags = [bad.cpu().view(utterances, -1) for bad in self.bad_rows]
        return torch.cat(flags, dim=1).flatten().nonzero().flatten().tolist() if flags else []

    def record(self, utterances: int) -> dict:
        """What a dump tells of the teacher: its files and their hashes, and what is not finite of it."""
        return {**self.facts, "nonfinite": tensor_stats(self.bad_tensors()), "rows": self.rows_at_fault(utterances)}


# -------------------------------------------------------------------------------------------------------- losses


def embedding_loss(student, teacher):
    """1 - cosine of embeddings (rows, D) of one size, the mean over the rows.

    The embedding-level loss of Wang et al. 2019, "Knowledge distillation for small foot-print deep speaker embedding".
    """
    student, teacher = (F.normalize(x, dim=1, eps=1e-6) for x in (student, teacher))
    return (1.0 - (student * teacher).sum(dim=1)).mean()


def similarity_loss(student, teacher):
    """For embeddings (rows, D) and (rows, E): 1 - cosine of what they say of a row's likeness to each other row.

    Of a row that is its cosines with the rest of the batch. With b rows it is b / 2 times the loss of Tung and Mori
    2019, "Similarity-preserving knowledge distillation", section 3, of length-normalised embeddings and without the
    diagonal, which is 1. It needs no weights. A batch of one row has no pairs and gives 0.
    """
    rows = len(student)
    if rows < 2:
        return 0.0 * student.sum()
    others = ~torch.eye(rows, dtype=torch.bool, device=student.device)
    return embedding_loss(*(cosine_matrix(x, x)[others].view(rows, -1) for x in (student, teacher)))


def logit_loss(student, teacher, temperature: float):
    """T^2 KL(teacher || student) of the softmax of logits (rows, classes) over T, the mean over the rows.

    Hinton et al. 2015, "Distilling the knowledge in a neural network", section 2: T^2 keeps the size of the gradient.
    """
    told, heard = (F.log_softmax(x / temperature, dim=1) for x in (teacher, student))
    return F.kl_div(heard, told, reduction="batchmean", log_target=True) * temperature**2


# ---------------------------------------------------------------------------------------- the teacher of a network


def distillation_of(network: nn.Module) -> Distillation | None:
    """What a network learns from, None without a teacher."""
    return vars(network).get(NAME)


def attach(network: nn.Module, config: Config, dataset, log):
    """Let a network learn from the teacher of the configuration, if there is one; ``log(text)`` prints a line.

    ``dataset`` knows the speakers. UsageError if teacher and student do not go together.
    """
    if not config.teacher_checkpoint:
        return
    teacher = read_teacher(config)
    if config.distillation_type != "cosine":
        check_classes(teacher, network.loss, dataset, config)
    taught = teach(network, teacher, config.values())
    if taught.classifier is not None and not gives_logits(taught.classifier):
        name = teacher.state["config"]["trainfunc"]
        raise UsageError(f"distillation_type: the teacher's loss '{name}' gives no logits; {INSTEAD}")
    size = sum(p.numel() for p in taught.teacher.parameters())
    compared = {"cosine": "embeddings", "logits": "classes", "both": "embeddings and classes"}[config.distillation_type]
    if teacher.config.nOut != config.nOut and config.distillation_type != "logits":
        compared += f" (of {teacher.config.nOut} and {config.nOut} values: by the similarities within a batch)"
    log(
        f"teacher {teacher.path}: {teacher.config.model} ({size:,} parameters); the student follows its {compared}, "
        f"weight {config.distillation_alpha:g}"
    )


def teach(network: nn.Module, teacher: Teacher, values: dict) -> Distillation:
    """Let a network learn from a teacher by the ``values`` of the configuration."""
    classifier = None if values["distillation_type"] == "cosine" else teacher.classifier()
    facts = {"model": teacher.config.model, "files": teacher.files}
    taught = vars(network)[NAME] = Distillation(teacher.model(), classifier, values, facts)
    return taught


def gives_logits(loss) -> bool:
    """Whether a loss says the logits of its classes: ``class_logits(x) -> (rows, classes)``, without a margin."""
    return callable(getattr(loss, "class_logits", None))


def check_classes(teacher: Teacher, loss, dataset, config: Config):
    """UsageError unless student and teacher have logits of the same classes in the same order."""
    kind = f"distillation_type: {config.distillation_type} compares classes, but"
    if not gives_logits(loss):
        raise UsageError(f"{kind} loss '{config.trainfunc}' (trainfunc) gives no logits; {INSTEAD}")
    carried = teacher.state.get("config")
    if not isinstance(carried, dict) or "speakers" not in teacher.state:
        raise UsageError(f"{kind} {teacher.path} does not say which speakers its classes are; {INSTEAD}")
    if teacher.state["speakers"] != dataset.speakers_hash():
        lists = f"other speakers than those of '{config.train_list}', or in another order"
        raise UsageError(f"{kind} {teacher.path} was trained with {lists}; {INSTEAD}")
    if carried.get("nClasses") != config.nClasses:
        theirs, keys = carried.get("nClasses"), "speed_perturb and nClasses must be the teacher's"
        raise UsageError(f"{kind} {teacher.path} has {theirs} of them, this run {config.nClasses}: {keys}; {INSTEAD}")


def fault_of_teacher(network: nn.Module) -> tuple[str, str, list[int]] | None:
    """(what, where, rows) of a teacher that is at fault in the last step; None without one, or if it is not.

    ``where`` names a tensor if the teacher's weights are bad; rows are [] then.
    """
    taught = distillation_of(network)
    if taught is None:
        return None
    of = f"models/{taught.facts['model']}.py of {next(iter(taught.facts['files']))}"
    bad = next(iter(taught.bad_tensors()), "")
    if bad:
        return f"the teacher's '{bad}' is not finite ({of})", f"{NAME}.{bad}", []
    rows = taught.rows_at_fault(getattr(network, "per_row", 1))
    if rows:
        return f"the teacher's embedding of {plural(len(rows), 'row')} is not finite ({of})", f"{NAME}.teacher", rows
    return None


def facts_of_teacher(network: nn.Module) -> dict:
    """What a checkpoint tells of a teacher: {'teacher': {model, files}}, {} without one. Its weights are none of it."""
    taught = distillation_of(network)
    return {} if taught is None else {"teacher": taught.facts}


def hash_of_teacher(network: nn.Module) -> str:
    """One hash of the files of a teacher, which all processes must have the same; '' without one."""
    files = facts_of_teacher(network).get("teacher", {}).get("files", {})
    return hashlib.sha256("".join(files.values()).encode()).hexdigest() if files else ""


def modules_of(network: nn.Module):
    """(name, module) of a network and of its teacher."""
    yield from network.named_modules()
    taught = distillation_of(network)
    if taught is not None:
        yield from taught.named_modules(prefix=NAME)


def tensors_of(network: nn.Module) -> tuple[list, list]:
    """The (name, parameter) and the (name, buffer) of a network and of its teacher."""
    parameters, buffers = [*network.named_parameters()], [*network.named_buffers()]
    taught = distillation_of(network)
    if taught is not None:
        parameters += taught.named_parameters(prefix=NAME)
        buffers += taught.named_buffers(prefix=NAME)
    return parameters, buffers
