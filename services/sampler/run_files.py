"""The run's model files (config, tokenizer, chat template), fetched from the learner by object id."""

import asyncio
import shutil
from pathlib import Path

from services.runtime.backoff import Backoff
from services.runtime.errors import CorruptObjectError, ExhaustedError, ObjectGoneError, UnavailableError
from services.runtime.files import storage_errors
from services.runtime.log import get_logger
from services.sampler.object_cache import ObjectCache
from services.wire.convert import model_files_sha256
from services.wire.types import ModelFile, RunSettings

_log = get_logger("sampler.files")


async def fetch_model_files(settings: RunSettings, cache: ObjectCache, state_dir: Path) -> Path:
    """The directory state_dir/model/<sha256>, complete. Tries until the learner has sent all.

    Raises CorruptObjectError when the settings contradict themselves, StorageError.
    """
    if model_files_sha256(settings.model_files) != settings.model_files_sha256:
        raise CorruptObjectError("the run's model files do not have the digest that the learner names: update one end")
    directory = state_dir / "model" / settings.model_files_sha256
    with storage_errors(f"write {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        for file in settings.model_files:
            source = await _fetch(file, cache)
            part = directory / f".{file.name}.part"
            await asyncio.to_thread(shutil.copyfile, source, part)
            part.replace(directory / file.name)
    _log.info("model_files_ready", files=len(settings.model_files), directory=directory)
    return directory


async def _fetch(file: ModelFile, cache: ObjectCache) -> Path:
    backoff = Backoff()
    while True:
        try:
            return await cache.fetch(file.object, lambda _: None)
        except (UnavailableError, ExhaustedError, ObjectGoneError, CorruptObjectError) as error:
            wait_s = backoff.next_delay_s()
            _log.warning("model_file_failed", name=file.name, error=error, retry_s=round(wait_s, 2))
            await asyncio.sleep(wait_s)
