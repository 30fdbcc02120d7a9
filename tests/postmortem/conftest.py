"""What several tests of the post-mortem use."""

import pytest


@pytest.fixture
def dump_of(settings, tools):
    """Train until a step fails and return its dump's path; ``spoil(trainer)`` puts the fault in."""

    def make(spoil=None, **keys):
        trainer = tools.build(settings, **keys)
        if spoil:
            spoil(trainer)
        for batch in tools.batches(trainer)[:3]:
            trainer.progress.batch += 1
            if trainer.accept(batch):
                trainer.train_step([batch])
        trainer.close()
        return sorted(trainer.incidents.writer.folder.glob("nan_*.pt"))[0]

    return make
