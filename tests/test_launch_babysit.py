"""Babysitting: a preempted run goes on, faults that pass are waited for, and what won't pass ends it."""

from __future__ import annotations

import launching
import pytest
from launching import BABYSIT, HERE, TRAIN

launch, repository = launching.launch, launching.repository  # fixtures


def test_a_preempted_slice_is_made_anew_and_the_same_command_goes_on(launch):
    launch.answers(
        states=["NONE", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE", "PREEMPTED", "ACTIVE"],
        jobs=["job: none, a", "job: running, a", "job: none, a", "job: exited 0, a"],
    )
    done = launch(*BABYSIT, "--max-restarts", 2, *TRAIN)
    begin = ["scp", "setup", "resume"]
    asked = [verb for verb in launch.verbs() if verb not in ("describe", "status")]
    assert asked == ["create", *begin, "delete", "create", *begin, "delete", "create"]
    sent = [call for call in launch.calls() if "worker.sh resume" in " ".join(call)]
    assert sent[0] == sent[1] and "train tiny --run /mnt/pkv/a" in " ".join(sent[0])
    assert "restart 2 of at most 2" in done.stdout and "done; the machines stay" in done.stdout
    assert launch.calls(but=("gcloud", "sudo"))[0] == ["sleep", "1"]


def test_restarts_are_bounded(launch):
    launch.answers(states=["SUSPENDED"])
    done = launch(*BABYSIT, "--max-restarts", 2, *TRAIN, code=1)
    assert launch.verbs().count("create") == 2 and "--max-restarts 2 reached" in done.stderr


def test_a_run_that_fails_is_started_again_after_a_second_look(launch):
    failed = "job: exited 1, a job: exited 0, b"
    launch.answers(states=["ACTIVE"], jobs=[failed, failed, "job: running, a", "job: exited 0, a"])
    launch(*BABYSIT, *TRAIN)
    assert launch.verbs().count("resume") == 1


def test_what_a_person_stopped_is_not_started_again(launch):
    launch.answers(states=["ACTIVE"], jobs=["job: stopped, a"])
    assert "stopped by hand" in launch(*BABYSIT, *TRAIN).stdout and launch.verbs() == ["describe", "status"]


RUNNING, DONE, MISTAKE = "job: running, a job: running, b", "job: exited 0, a", "job: exited 2, a job: exited 2, b"


@pytest.mark.parametrize(
    ("jobs", "starts"),
    [
        ([MISTAKE], 1),  # the end, though there are restarts left
        ([MISTAKE, MISTAKE, RUNNING, DONE], 1),
        ([*[MISTAKE] * 2, RUNNING, *["job: exited 2, a job: exited 1, b"] * 2, RUNNING, *[MISTAKE] * 2, DONE], 3),
        ([*[MISTAKE] * 2, *[RUNNING] * 10, *[MISTAKE] * 2, DONE], 2),  # a start that ran long breaks the row
    ],
    ids=("a mistake", "a fault that passes", "faults of one host", "faults with days between"),
)
def test_exit_code_2_ends_the_babysitting_when_the_next_start_has_it_too(launch, jobs, starts):
    launch.answers(states=["ACTIVE"], jobs=jobs)
    done = launch(*BABYSIT, *TRAIN, code=jobs[-1] == MISTAKE)
    assert launch.verbs().count("resume") == starts
    assert ("did so again: a mistake in the command or config" in done.stderr) == (jobs[-1] == MISTAKE)
    assert "the machines" in done.stdout + done.stderr and "until they are deleted" in done.stdout + done.stderr


def test_a_start_that_never_was_is_no_second_mistake(launch):
    launch.answers(states=["ACTIVE"], jobs=[MISTAKE])
    (launch.folder / "homes/w0/pkv.bundle").mkdir()  # so that it can't be copied there
    done = launch(*BABYSIT, "--max-restarts", 3, *TRAIN, code=1)
    assert "--max-restarts 3 reached" in done.stderr and "mistake" not in done.stderr


def test_a_worker_whose_start_was_lost_is_started_beside_the_others(launch):
    uneven = "job: running, a job: none, b"
    launch.answers(states=["ACTIVE"], jobs=[uneven, RUNNING, uneven, uneven, uneven, RUNNING, DONE])
    done = launch(*BABYSIT, *TRAIN)
    assert launch.verbs().count("resume") == 1 and "some workers only; restart 1 of" in done.stdout


def test_babysitting_gives_up_when_nothing_works(launch):
    launch.answers(states=["ACTIVE"], jobs=["nobody answers"])
    done = launch(*BABYSIT, *TRAIN, code=1)
    assert "asking failed 10 times; given up" in done.stderr


def test_a_network_that_is_out_for_long_ends_nothing_once_workers_were_heard(launch):
    launch.answers(
        states=["ACTIVE", *["OFFLINE"] * 30, "ACTIVE"],
        jobs=[RUNNING, *["nobody answers"] * 30, RUNNING, DONE],
    )
    done = launch(*BABYSIT, *TRAIN)
    assert done.stdout.count("no answer; asked again") == 60 and "done; the machines stay" in done.stdout
    assert set(launch.verbs()) == {"describe", "status"}


def test_only_restarts_without_a_new_checkpoint_are_counted(launch):
    preempted = ["SUSPENDED", "ACTIVE"]
    launch.answers(states=preempted * 6, jobs=[*(f"{RUNNING}, saved {step}" for step in range(8, 13)), DONE])
    done = launch(*BABYSIT, "--max-restarts", 2, *TRAIN)
    assert launch.verbs().count("create") == 6 and done.stdout.count("restart 1 of at most 2") == 6
    launch.answers(states=preempted * 6, jobs=[f"{RUNNING}, saved 12"])
    done = launch(*BABYSIT, "--max-restarts", 2, *TRAIN, code=1)
    assert "after 2 restarts without a new checkpoint" in done.stderr
    assert "worker.sh status /mnt/pkv/a 2>/dev/null" in str(launch.calls())


def test_a_worker_says_the_last_step_that_is_saved(launch):
    launch("tpu_vm.sh", "setup", "a1", *HERE)
    home, run = launch.folder / "homes/w0", launch.folder / "a run"
    for steps, said in ((), ""), (("9", "20", "21.orbax-checkpoint-tmp"), ", saved 20"):
        for step in steps:
            (run / "checkpoints" / step).mkdir(parents=True)
        done = launch(home / "pkv/launch/worker.sh", "status", run, HOME=str(home))
        assert done.stdout.endswith(f"commit {launch.commit[:7]}{said}\n")
