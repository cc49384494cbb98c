"""A game: two players each put down a picture; the model reads them, and keeps the score.

python -m examples.game
"""

import random

from examples.conversation import Conversation, sample
from mmkernels.training.phrases import DIGITS, numbers_in


def main(rounds: int = 3, seed: int = 0) -> dict[str, int]:
    """Plays; returns how many rounds each player won."""
    referee = Conversation("players", "referee")
    chance = random.Random(seed)
    score = {"Ada": 0, "Ben": 0}
    try:
        for _ in range(rounds):
            cards = {player: chance.choice(DIGITS) for player in score}
            read = {}
            for player, card in cards.items():
                told = referee.ask("Which digit is this?", picture=sample(card, "png"))
                read[player] = (numbers_in(told["content"]) or [0])[0]
            first, second = read.values()
            if first == second:
                print("A draw.")
                continue
            words = f"{DIGITS[first]} or {DIGITS[second]}"
            larger = numbers_in(referee.ask(f"Which is larger, {words}?")["content"])
            winner = next((p for p, digit in read.items() if [digit] == larger), None)
            if winner is not None:
                score[winner] += 1
                print(f"{winner} wins the round.")
    finally:
        referee.client.close()
    print("Score:", ", ".join(f"{player} {won}" for player, won in score.items()))
    return score


if __name__ == "__main__":
    main()
