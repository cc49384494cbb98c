"""Do the three conversations run, and does the model say in them what is right?"""

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("PIL")

from examples import game, service_desk, tutor
from mmkernels.training.phrases import numbers_in


def test_the_service_desk_reads_and_hears():
    said = service_desk.main()
    assert numbers_in(said[2]) == [4]
    assert numbers_in(said[3]) == [9]
    assert "different" in said[4]
    assert numbers_in(said[5]) == [5]


def test_the_tutor_adds_what_it_made_itself(tmp_path):
    said = tutor.main(tmp_path)
    assert numbers_in(said[0])[-1] == 10
    assert numbers_in(said[2])[-1] == 8
    assert (tmp_path / "tutor-seven.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tutor-three.wav").read_bytes().startswith(b"RIFF")


def test_the_game_has_a_winner_in_every_round_that_is_no_draw(capsys):
    score = game.main()
    printed = capsys.readouterr().out
    assert sum(score.values()) + printed.count("A draw.") == 3
