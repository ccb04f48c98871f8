"""Train a LoRA on a Flux pipeline, from a dataset to `adapter.safetensors`.

    python -m training.lora models/mini --data dataset --out runs/lora --steps 2000
    python -m training.lora flux1-dev.safetensors --encoders FLUX.1-dev --data dataset --out run
    accelerate launch --num_processes 8 -m training.lora FLUX.1-dev --data dataset --out run

The paper's adapter is of rank 64 over all linear layers of both kinds of blocks; its other settings
are not published, and every default says where it comes from (`--help`). Pictures and texts are
encoded once into `OUT/cache`. The run saves its state every few minutes and on SIGTERM (status 143)
or SIGINT (130); the same command goes on, on one CPU process to the bit. The last line is JSON:
`adapter, steps, loss, samples_per_s, peak_bytes, ...`.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

from dermaflux.command import ended
from training.lora.settings import parsed


def main(arguments: Sequence[str] | None = None) -> int:
    def work() -> int:
        settings = parsed(arguments)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        # Heavy, so imported when the settings are known to be right.
        from accelerate.state import PartialState  # type: ignore[import-untyped, unused-ignore]

        from training.lora.run import run

        result = run(settings)
        state = PartialState()
        if state.is_main_process:
            print(json.dumps(dict(result.report)))
        # Processes leave together: one that is left alone aborts.
        state.wait_for_everyone()
        state.destroy_process_group()
        return result.status

    return ended(work)


if __name__ == "__main__":
    sys.exit(main())
