"""A server as a process on the GPU, under load from a client of its own.

    cd tests && python -m gpu.bench_server OUT

Writes OUT/bench-N.json for N requests at once.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from gpu.bench_decode import CONFIG, REAL, save_base
from support.serving import ServerProcess

# As an installed `turret`.
TURRET = (sys.executable, "-c", "from turret_cli import run; run()")
CONCURRENCY = (1, 8, 32, 64) if REAL else (1,)
PROMPT_TOKENS, MAX_TOKENS = (128, 64) if REAL else (4, 2)
ROUNDS = 3 if REAL else 1


def load(address: str, concurrency: int, out: Path) -> None:
    options = {
        "--server": address,
        "--concurrency": concurrency,
        "--requests": concurrency * ROUNDS,
        "--prompt-tokens": PROMPT_TOKENS,
        "--max-tokens": MAX_TOKENS,
        "--output": out / f"bench-{concurrency}.json",
    }
    words = [str(word) for option in options.items() for word in option]
    subprocess.run([*TURRET, "bench", *words], check=True)  # noqa: S603 (our own command)


def main(out: Path) -> None:
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_base(model)
        where = ("--model", model, "--cache", Path(folder) / "cache", "--store", Path(folder) / "store")
        how = ("--device", "cuda", "--memory", "0.3") if REAL else ("--device", "cpu", "--memory", "8MiB")
        server = ServerProcess(*map(str, (*where, *how)), program=TURRET)
        try:
            for concurrency in CONCURRENCY:
                load(server.address, concurrency, out)
        finally:
            sys.stdout.write(f"server ended with {server.stop()}\n{''.join(server.log)}")


if __name__ == "__main__":
    assert CONFIG.max_position_embeddings > PROMPT_TOKENS + MAX_TOKENS
    main(Path(sys.argv[1]))
