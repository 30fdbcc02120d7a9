"""The TensorBoard file of a run, as bytes to append: no thread writes it, so that a full disk is met in its place."""

import io
import os
import socket
import struct
import time


class EventFile:
    """Encodes scalars and pictures for one file in ``folder``; what older files say from ``step`` on is hidden."""

    def __init__(self, folder, step: int):
        self.path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._step = step
        self._begun = False

    def scalar(self, tag: str, value: float, step: int) -> bytes:
        """The record of a scalar; before the first record stands the head of the file."""
        return self._record(step, tag, simple_value=value)

    def picture(self, tag: str, png: bytes, step: int) -> bytes:
        """The record of a PNG picture."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always the first
        image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
        return self._record(step, tag, image=image)

    def _record(self, step: int, tag: str, **value) -> bytes:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary

        head = b""
        if not self._begun:
            self._begun = True
            head = _encoded(step=self._step, file_version="brain.Event:2")
            head += _encoded(step=self._step, session_log=SessionLog(status=SessionLog.START))
        return head + _encoded(step=step, summary=Summary(value=[Summary.Value(tag=tag, **value)]))


def _encoded(**fields) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    RecordWriter(buffer).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return buffer.getvalue()
