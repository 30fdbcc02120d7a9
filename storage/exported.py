"""Exported models: ONNX files that export.py wrote, opened in onnxruntime."""

from pathlib import Path

from errors import UsageError, first_line
from settings.command_line import need


class OnnxModel:
    """An ONNX file that takes waveforms: called with (B, samples) float32, it gives embeddings (B, D) float32.

    It computes a call on one thread, for ``embed_files`` makes several calls at once. UsageError if the file is not
    one of export.py's, takes features, or was exported from another model than ``identity`` says.
    """

    def __init__(self, path, identity: str):
        need("--onnx", "onnxruntime")
        if Path(path).suffix != ".onnx":
            raise UsageError(f"--onnx: '{path}' does not end in .onnx")
        try:
            self.session = open_session(path, threads=1)
        except Exception as error:  # onnxruntime's own classes, which depend on what is wrong
            raise UsageError(f"--onnx: '{path}' cannot be opened: {first_line(error)}") from error
        facts = self.session.get_modelmeta().custom_metadata_map
        if "identity" not in facts:
            raise UsageError(f"--onnx: '{path}' does not say which model it is of; export it by export.py")
        if facts["identity"] != identity:
            raise UsageError(f"--onnx: '{path}' was exported from another model than --initial_model names")
        self.input = self.session.get_inputs()[0].name
        if self.input != "waveform":
            option = "--input features" if self.input == "features" else "--for sherpa-onnx"
            raise UsageError(f"--onnx: '{path}' takes features, and not a waveform; export it without {option}")

    def __call__(self, x):
        import torch

        return torch.from_numpy(self.session.run(None, {self.input: x.numpy()})[0])


def open_session(path, threads: int = 0):
    """Open an ONNX file in onnxruntime on the CPU, with so many threads; 0: one for each core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
