"""Many prompts over the GPUs of a Ray cluster: `bitdance generate` with a worker per GPU, and the same pictures.

    pip install 'ray[data]'
    python examples/ray_generate.py --prompts jobs.jsonl -o out --model demo --gpus-per-worker 1 --workers 8

Every option of `bitdance generate` but --device holds here. The model folder and the output folder must be reachable
under the same path on every node (a shared file system). Planning, names, seeds, skipping what is finished, and writing
are those of `bitdance generate`: run the same command again after a stop, here or there, and it goes on. Exit codes too.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from bitdance.cli import UsageError, report
from bitdance.cli.generate import conclude, parser, read_spec
from bitdance.cli.stop import Stopped, StopSignals
from bitdance.jobs.job import Job, batches
from bitdance.jobs.outputs import OutputFolder
from bitdance.jobs.runner import BatchRunner, RunSpec

BATCHES = 4  # a worker gets so many at a time: inside, writing one overlaps with making the next


class Painter:
    """A worker of Ray Data: it keeps the model, and makes the pictures of one block after the other."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec, self.pipe = spec, spec.rules.load(spec)
        self.output = OutputFolder(spec.output, spec.model)
        self.jobs = {job.index: job for job in spec.jobs}

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Indices of jobs ("data") → the same and "error", which is empty where the picture is in the folder now."""
        jobs = [self.jobs[index] for index in rows["data"].tolist()]
        runner = BatchRunner(self.spec, self.output)
        # Ray hands a block out again when its worker was lost: some of it may be finished.
        runner.make(self.pipe, self.output.missing(jobs, self.spec.hash))
        errors = {job.index: error for job, error in runner.failures}
        return {"data": rows["data"], "error": np.array([errors.get(job.index, "") for job in jobs])}


def blocks(jobs: Sequence[Job], batch_size: int, workers: int) -> list[list[Job]]:
    """What a worker gets at a time: equal settings, similar prompts, something for every worker."""
    size = min(BATCHES * batch_size, math.ceil(len(jobs) / workers))
    return batches(jobs, size, lambda job: len(job.prompt.encode()))  # the worker orders them by tokens


def paint(spec: RunSpec, todo: Sequence[Job], options: argparse.Namespace) -> Iterator[Mapping[str, Any]]:
    """Yield {"data": index of a job, "error"} in the order in which blocks are finished."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one, over pictures
    parts = blocks(todo, spec.batch_size, options.workers)
    workers = ray.data.ActorPoolStrategy(size=min(options.workers, len(parts)), max_tasks_in_flight_per_actor=2)
    return iter(
        ray.data.from_numpy([np.array([job.index for job in part]) for part in parts])
        .map_batches(
            Painter,
            fn_constructor_args=(spec,),
            batch_size=None,  # as they are: a block at a time
            compute=workers,
            num_gpus=options.gpus_per_worker or None,
            num_cpus=options.cpus_per_worker,
        )
        .iter_rows()
    )


def read(argv: Sequence[str] | None) -> tuple[argparse.Namespace, RunSpec]:
    """The options, and what they ask for; ValueError or FileNotFoundError name what is wrong."""
    flags = parser("ray_generate.py")
    flags.add_argument("--workers", type=int, default=1, help="processes, each with the model (default: 1)")
    flags.add_argument("--gpus-per-worker", type=float, default=1, help="0: on the CPU (default: 1)")
    flags.add_argument("--cpus-per-worker", type=float, default=1, help="cores that Ray sets aside (default: 1)")
    flags.add_argument("--address", help="Ray's address (default: the cluster this runs in, else this machine)")
    options = flags.parse_intermixed_args(argv)
    if options.device is not None or options.workers < 1:
        raise UsageError("at least 1 worker is needed, and --device is left to Ray: --gpus-per-worker 0 means the CPU")
    # This process may run on a machine without a GPU: it plans on the CPU for workers that have one.
    options.device = "cpu"
    if options.gpus_per_worker and options.dtype is None:
        options.dtype = "bfloat16"
    spec = read_spec(options)
    device = "cuda" if options.gpus_per_worker else "cpu"
    here = {"output": spec.output.absolute(), "folder": spec.folder.absolute()}
    return options, replace(spec, jobs=list(spec.jobs), device=device, **here)  # the workers get the jobs, not the file


def generate(options: argparse.Namespace, spec: RunSpec) -> int:
    """0 all done, 1 some failed (failures.jsonl), 128 + signal when stopped."""
    output = OutputFolder(spec.output, spec.model, spec.shard)
    output.check_writable()
    with output.held():
        return _generate(options, spec, output)


def _generate(options: argparse.Namespace, spec: RunSpec, output: OutputFolder) -> int:
    todo = output.missing(spec.jobs, spec.hash)
    jobs = {job.index: job for job in todo}
    failures: list[tuple[Job, str]] = []
    with StopSignals() as stop, tqdm(total=len(todo), unit="picture", disable=not sys.stderr.isatty()) as bar:
        try:
            if todo:
                output.folder.mkdir(parents=True, exist_ok=True)
                for row in paint(spec, todo, options):
                    with stop.held():
                        if row["error"]:
                            failures.append((jobs[row["data"]], row["error"]))
                        bar.update()
        except Stopped as stopped:
            if failures:
                output.write_failures(failures)
            report(f"{stopped} after {bar.n} of {len(todo)} pictures or more; the same command goes on", "stopped")
            return stopped.code
    output.write_failures(failures)
    grid = spec.grid and output.write_grid(spec.jobs, [job for job, _ in failures])
    return conclude(spec, output, len(todo) - len(failures), failures, len(spec.jobs) - len(todo), grid)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code."""
    try:
        options, spec = read(argv)
        import ray
    except ModuleNotFoundError as error:
        report(f"this example needs {error.name}: pip install 'ray[data]'")
        return 2
    except (ValueError, FileNotFoundError) as error:
        report(str(error))
        return 2
    ray.init(address=options.address, log_to_driver=False, logging_level="error")
    try:
        return generate(options, spec)
    except (ValueError, OSError, ray.exceptions.RayError) as error:
        reason = str(error).strip().splitlines()[-1]  # above it stand Ray's remarks
        report(f"{reason}; the same command goes on from there")
        return 1
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main())
