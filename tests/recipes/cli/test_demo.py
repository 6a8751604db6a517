"""The demo's figures come from the files of its runs."""

from curation.recipes.cli import demo

HEADER = "curation/train_seconds,epoch,step,train_loss,val_loss\n"


def write(folder, losses, seconds=(2.5, 5.5)):
    folder.mkdir(parents=True)
    lines = [f",0,0,,{losses[0]}\n"]
    for step, s, loss in zip((3, 7), seconds, losses[1:], strict=True):
        lines += [f"{s},0,{step},4.0,\n", f",0,{step},,{loss}\n"]
    (folder / "metrics.csv").write_text(HEADER + "".join(lines))


def test_curve_starts_before_the_first_step(tmp_path):
    write(tmp_path / "arm", (5.0, 4.5, 4.0))
    assert demo.read_curve(tmp_path / "arm" / "metrics.csv") == [(0, 0.0, 5.0), (4, 2.5, 4.5), (8, 5.5, 4.0)]


def test_the_closing_line_names_the_winner_by_steps_and_by_seconds(tmp_path, monkeypatch, capsys):
    def run_arm(arm, out):
        if arm == "UniformSelection":
            write(out / arm, (5.0, 4.5, 4.25))
        else:
            write(out / arm, (5.0, 4.5, 4.0), seconds=(6.0, 12.0))
        return {"steps": 8, "scored": 32, "trained": 8, "seconds": 5.5}

    monkeypatch.setattr(demo, "run_arm", run_arm)
    demo.main(["--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "after equal steps: UtilityDiversitySelection; after equal seconds (6): UniformSelection. One seed" in out
    assert "4.250" in out
    assert "4.000" in out
    assert (tmp_path / "learning_curves.png").stat().st_size > 10_000
