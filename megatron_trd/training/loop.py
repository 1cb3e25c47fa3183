"""Trajectory-Refined Distillation, as written in the paper."""

from __future__ import annotations

from megatron_trd.training.run import Run


def train(run: Run) -> None:
    """Run the remaining steps, or fewer if the run is asked to stop; a checkpoint is saved at the end either way."""
    config = run.config
    run.evaluate(run.steps_done)  # on held-out problems, if due
    for step in range(run.steps_done, config.steps):
        with run.phases.measure("step"):
            # x ~ problems, y_o ~ student(. | x) with the current weights, and for TRD y_r ~ teacher(. | x, y_o [, y*])
            sampled = run.sample(step)
            samples = run.builder.samples(sampled.trajectories)
            shares = run.shares(samples)

            results = []
            for _ in range(config.epochs_per_batch if samples else 0):
                # stopgrad teacher(. | x, y_o, y_r<t), as hidden states at response positions
                with run.phases.measure("teacher"):
                    hidden = run.teacher.hidden(samples, shares)

                # mean over t of KL( teacher(. | x, y_o, y_r<t) || student(. | x, y_r<t) ), and one optimizer step
                with run.phases.measure("train"):
                    share = shares[run.student.grid.dp_rank]
                    results.append(run.student.train_step(samples, share, hidden, run.teacher.head))
                    run.teacher.update()

        run.log(step, sampled, samples, results)

        done, stop = step + 1, run.stop.agreed()
        if not stop or done == config.steps:  # a run stopped here evaluates when it is resumed
            run.evaluate(done)
            stop = run.stop.agreed()
        if stop or done == config.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
            run.save(done)
        if stop:
            break
