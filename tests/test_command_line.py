"""Hydra's multirun: runs in folders of their own, and what ends all of them."""

import sys

import pytest

from mamba3_train.config import command


@pytest.fixture
def jobs(tmp_path, monkeypatch, capfd):
    """Run a training command whose jobs only note what they were given; returns their notes, exit code, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, end=lambda config: None):
        notes = []

        def run(config):
            notes.append((config.run.dir, sys.argv[1:]))
            return end(config)

        monkeypatch.setattr(sys, "argv", ["mamba3_train", *arguments])
        try:
            command("train")(run)()
        except SystemExit as stop:
            return notes, stop.code, capfd.readouterr().err
        return notes, 0, capfd.readouterr().err

    return call


def test_jobs_have_folders_and_commands_of_their_own(jobs):
    notes, code, _ = jobs("-m", "+recipe=quickstart", "optimizer.lr=1e-3,2e-3", "schedule=wsd")
    assert code == 0
    first, second = (f"quickstart-optimizer.lr_{lr}" for lr in ("0.001", "0.002"))
    assert notes == [
        (f"runs/{first}", ["+recipe=quickstart", "optimizer.lr=0.001", "schedule=wsd", f"run.name={first}"]),
        (f"runs/{second}", ["+recipe=quickstart", "optimizer.lr=0.002", "schedule=wsd", f"run.name={second}"]),
    ]
    # What a job starts with its command is that job.
    again, code, _ = jobs(*notes[1][1])
    assert (code, again) == (0, [notes[1]])


def test_recipes_have_names_and_a_user_s_own_are_kept(jobs):
    notes, _, _ = jobs("-m", "+recipe=180m_siso,180m_mimo", "schedule=cosine,wsd")
    assert [folder for folder, _ in notes] == [
        f"runs/{recipe}-schedule_{schedule}" for recipe in ("180m_siso", "180m_mimo") for schedule in ("cosine", "wsd")
    ]
    notes, _, _ = jobs("-m", "+recipe=quickstart", "run.name=a,b")
    assert [folder for folder, _ in notes] == ["runs/a", "runs/b"]


def test_one_folder_for_several_runs_is_refused(jobs):
    notes, code, errors = jobs("-m", "+recipe=quickstart", "run.seed=0,1", "run.dir=here")
    assert (notes, code) == ([], 2)
    assert "run.dir=here is one folder, but -m starts several runs" in errors


def test_a_launcher_around_several_runs_is_refused(jobs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    notes, code, errors = jobs("-m", "+recipe=quickstart", "run.seed=0,1")
    assert (notes, code) == ([], 2)
    assert "leave the launcher out" in errors


def test_the_first_job_that_fails_ends_all_and_one_that_started_processes_does_not(jobs):
    seeds = ["-m", "+recipe=quickstart", "run.seed=0,1,2"]
    notes, code, _ = jobs(*seeds, end=lambda config: sys.exit(0))
    assert (len(notes), code) == (3, 0)
    notes, code, _ = jobs(*seeds, end=lambda config: 85 if config.run.seed == 1 else 0)
    assert (len(notes), code) == (2, 85)
    notes, code, _ = jobs(*seeds, end=lambda config: sys.exit(7))
    assert (len(notes), code) == (1, 7)
