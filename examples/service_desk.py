"""A service desk: a customer shows the ticket, says the counter, and is told where to go.

python -m examples.service_desk
"""

from examples.conversation import Conversation, sample


def main() -> list[str]:
    """Holds the conversation; returns what the desk said."""
    desk = Conversation("customer", "desk")
    try:
        said = [
            desk.ask("Hello!"),
            desk.ask("What can you do?"),
            desk.ask("Which digit is this?", picture=sample("four", "png")),
            desk.ask("What digit do you hear?", sound=sample("nine", "wav")),
            desk.ask(
                "Are they the same digit or different?",
                picture=sample("four", "png"),
                sound=sample("nine", "wav"),
            ),
            desk.ask("What comes after four?"),
            desk.ask("Thank you!"),
        ]
    finally:
        desk.client.close()
    return [message["content"] for message in said]


if __name__ == "__main__":
    main()
