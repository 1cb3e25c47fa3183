"""Trajectory-Refined Distillation, as the paper writes it."""

from __future__ import annotations

from megatron_trd.training.run import Run


def train(run: Run) -> None:
    """Run the remaining steps, or fewer if the run is asked to stop: it ends with a checkpoint either way."""
    config = run.config
    run.evaluate(run.steps_done)  # held-out problems, where it is time for them
    for step in range(run.steps_done, config.steps):
        with run.phases.measure("step"):
            # x ~ problems, y_o ~ student(. | x) with the present weights, and for TRD y_r ~ teacher(. | x, y_o [, y*])
            trajectories = run.trajectories(step)
            samples = run.builder.samples(trajectories)
            shares = run.shares(samples)

            results = []
            for _ in range(config.epochs_per_batch if samples else 0):
                # stopgrad teacher(. | x, y_o, y_r<t), as hidden states of response positions
                with run.phases.measure("teacher"):
                    hidden = run.teacher.hidden(samples, shares)

                # mean over t of KL( teacher(. | x, y_o, y_r<t) || student(. | x, y_r<t) ), and one optimizer step
                with run.phases.measure("train"):
                    share = shares[run.student.grid.dp_rank]
                    results.append(run.student.train_step(samples, share, hidden, run.teacher.head))
                    run.teacher.update()

        run.log(step, trajectories, samples, results)

        done, stop = step + 1, run.stop.agreed()
        if not stop or done == config.steps:  # whoever stops now is asked at the resumed run's start
            run.evaluate(done)
            stop = run.stop.agreed()
        if stop or done == config.steps or (config.checkpoint.every and done % config.checkpoint.every == 0):
            run.save(done)
        if stop:
            break
