"""Load generator: sends many requests to a server and measures their latencies.

    async with AsyncClient(address) as client:
        generator = LoadGenerator(client, Workload(concurrency=8, num_requests=100, adapters=("pirate",)))
        await generator.run()
    print(summarise(generator.records, generator.seconds).output_tokens_per_second)

`turret bench` is its command line.
"""

from turret_client.bench._report import Latencies, Summary, percentile, summarise
from turret_client.bench._run import LoadGenerator, Record
from turret_client.bench._workload import Popularity, Workload

__all__ = [
    "Latencies",
    "LoadGenerator",
    "Popularity",
    "Record",
    "Summary",
    "Workload",
    "percentile",
    "summarise",
]
