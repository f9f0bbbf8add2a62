"""`jaxinfer chat`: a conversation through standard input."""

from jaxinfer.cli_commands import Sampling
from tests.cli.flags import EIGHT
from tests.helpers import tiny_llm


def chat_answers(model, *turns: str, system: str | None = None) -> list[str]:
    """The answers of LLM.chat to `turns`, one conversation."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    with tiny_llm(model, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        for turn in turns:
            messages.append({"role": "user", "content": turn})
            output = llm.chat(messages, Sampling(max_tokens=8).params())[0]
            answers.append(output.outputs[0].text)
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_chat_keeps_the_conversation(run, model):
    want = chat_answers(model, "hello", "and then?")
    status, out, err = run("chat", *EIGHT, stdin=b"hello\n\nand then?\n")
    assert (status, err) == (0, "")
    assert out == "".join(answer + "\n" for answer in want)


def test_chat_reset_exit_and_system(run, model):
    first = chat_answers(model, "hello", system="be brief")[0]
    assert first != chat_answers(model, "hello")[0]
    typed = b"hello\n/reset\nhello\n/exit\nnever read\n"
    status, out, err = run("chat", "--system", "be brief", *EIGHT, stdin=typed)
    assert (status, out, err) == (0, (first + "\n") * 2, "")


def test_chat_goes_on_after_a_turn_that_fails(run, model):
    want = chat_answers(model, "hello")[0]
    typed = ("x" * 3000 + "\nhello\n").encode()
    status, out, err = run("chat", *EIGHT, stdin=typed)
    assert (status, out) == (1, want + "\n")
    assert err.startswith("error: ")
    assert "/reset starts again" in err


def test_chat_help_and_bad_input(run):
    status, out, err = run("chat", stdin=b"/help\n")
    assert (status, out) == (0, "")
    assert "/reset" in err
    status, _, err = run("chat", stdin=b"\xff\xfe\n")
    assert status == 2
    assert "standard input: not UTF-8" in err
    assert run("chat", stdin=b"") == (0, "", "")
