"""The lock of a folder, also where the file system has none."""

import pytest

from corpus import locks
from errors import UsageError


@pytest.mark.parametrize("system", [True, False])
def test_a_folder_has_one_writer(tmp_path, monkeypatch, system):
    if not system:

        def acquire(self, timeout=None):
            raise NotImplementedError("no flock")

        monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    refused = pytest.raises(UsageError, match="^taken" if system else r"^taken; .* remove .*lock\.held")
    with locks.folder_lock(tmp_path / "lock", "taken"), refused, locks.folder_lock(tmp_path / "lock", "taken"):
        pass
    with locks.folder_lock(tmp_path / "lock"):
        pass
    with pytest.raises(OSError), locks.folder_lock("/dev/null/no/lock", "taken"):
        pass
