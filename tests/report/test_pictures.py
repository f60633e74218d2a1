"""Pictures show the truth cell by cell, from far away too; what would mislead is said or refused."""

import io
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import tiny

import variform
from variform.model.pattern_base import Text, visible_matrix
from variform.model.patterns import parse
from variform.report.pictures import as_text, draw_patterns, legend, look, shades_of, show
from variform.report.views import LONGEST_AT_ONCE, View, spans, views_of

SPECS = [
    "full",
    "prefix_lm",
    "sliding_window:3",
    "dilated:2,gap=3",
    "dilated:2,gap=1/2",
    "chunked:4,before=1",
    "local_global:2,tokens=1",
    "strided:3",
    "strided:3,heads=split",
    "fixed:4,summary=1,groups=2",
    "big_bird:2,random=1",
]
HALVES = {" ": (0, 0), "▀": (1, 0), "▄": (0, 1), "█": (1, 1)}


def read_back(lines, length):
    """The cells that half blocks show."""
    rows = [[HALVES[mark] for mark in line] for line in lines]
    halves = torch.tensor(rows).transpose(1, 2).flatten(0, 1)
    return halves[:length].bool()


def pooled(matrix, size):
    """The naive twin: the share of each cell's pairs that are seen, cell by cell."""
    starts = range(0, len(matrix), size)
    return torch.tensor([[matrix[a : a + size, b : b + size].float().mean() for b in starts] for a in starts])


def printed(views, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(show(views, width))
    return console.file.getvalue()


class TestTruth:
    @pytest.mark.parametrize("length", [1, 12, 13])
    @pytest.mark.parametrize("spec", SPECS)
    def test_a_terminal_shows_the_truth_cell_by_cell(self, spec, length):
        for view in views_of(spec, length=length):
            drawn = as_text(view.pattern, view.text).plain.splitlines()
            assert torch.equal(read_back(drawn, length), visible_matrix(view.pattern, view.text))

    @pytest.mark.parametrize("spec", SPECS)
    def test_a_figure_shows_the_truth_and_the_future_apart(self, spec):
        views = views_of(spec, length=13)
        for axes, view in zip(draw_patterns(spec, length=13).axes, views, strict=True):
            seen, shades = visible_matrix(view.pattern, view.text), axes.images[0].get_array()
            future = ~torch.ones(13, 13).tril().bool() & ~seen
            expected = torch.where(seen, 1.0, torch.where(future & view.text.is_causal, -1.0, 0.0))
            assert torch.equal(torch.tensor(shades.data), expected)

    def test_marks_and_prefixes_are_drawn(self):
        view = views_of("local_global:2", length=9, marked=[6, 6, 4], is_causal=False)[0]
        assert view.text.marked == (4, 6) and view.where == "both ways, places 4, 6 marked"
        (view,) = views_of("prefix_lm", length=9, prefix=4)
        assert view.text.prefix == 4 and view.where == "causal, prefix 4"

    def test_a_prefix_that_is_not_given_is_a_quarter(self):
        assert [view.text.prefix for view in views_of(["prefix_lm", "full"], length=20)] == [5, 0, 0]
        assert views_of("prefix_lm", prefix=0)[0].note == "Without a prefix, as full."

    @pytest.mark.parametrize("spec", SPECS)
    def test_packed_documents_see_themselves_alone(self, spec):
        lengths = (5, 1, 7)
        for view in views_of(spec, documents=lengths):
            texts = [view.text._replace(length=length) for length in lengths]
            expected = torch.block_diag(*(visible_matrix(view.pattern, text) for text in texts))
            assert torch.equal(look(view, 64).shares > 0, expected > 0)

    def test_a_mark_in_a_pack_is_of_its_document(self):
        (view,) = views_of("local_global:1", documents=[4, 5], marked=[6], is_causal=False)
        alone = visible_matrix(view.pattern, Text(5, False, marked=(2,)))
        assert torch.equal(look(view, 64).shares[4:, 4:] > 0, alone)


class TestLongTexts:
    @pytest.mark.parametrize(("length", "cells"), [(64, 16), (61, 16), (33, 32), (17, 5)])
    @pytest.mark.parametrize("spec", ["sliding_window:5", "strided:6", "full"])
    def test_a_cell_has_the_share_of_its_pairs(self, spec, length, cells):
        for view in views_of(spec, length=length):
            seen = look(view, cells)
            assert len(seen.shares) <= cells and seen.size == -(-length // cells)
            expected = pooled(visible_matrix(view.pattern, view.text), seen.size)
            torch.testing.assert_close(seen.shares, expected)

    def test_rows_that_are_looked_at_apart_make_the_same_picture(self, monkeypatch):
        (view,) = views_of("strided:5", length=101, is_causal=True)
        whole = look(view, 16)
        monkeypatch.setattr("variform.report.pictures.PAIRS_AT_ONCE", 1500)
        apart = look(view, 16)
        assert torch.equal(apart.shares, whole.shares) and torch.equal(apart.counts, whole.counts)

    def test_one_pair_is_enough_to_be_noticed(self):
        (view,) = views_of("strided:50,heads=column", length=200, is_causal=True)
        shades = shades_of(view, look(view, 20))
        assert float(shades[shades > 0].min()) >= 0.4
        expected = pooled(visible_matrix(view.pattern, view.text), 10) > 0
        drawn = as_text(view.pattern, view.text, most_cells=20).plain.splitlines()
        assert torch.equal(read_back(drawn, 20), expected)

    @pytest.mark.parametrize(
        ("spec", "length"), [("sliding_window:8", 32), ("sliding_window:100", 512), ("full", 32), ("chunked:11", 64)]
    )
    def test_a_text_is_long_enough_to_show_the_shape(self, spec, length):
        assert {view.text.length for view in views_of(spec)} == {length}

    def test_a_chunk_of_hashes_is_a_part_of_its_text(self):
        assert views_of("lsh:4,chunked=true")[0].text.length == 512

    def test_a_form_is_drawn_within_what_it_reads(self):
        config = tiny("decoder", attention_patterns=["sliding_window:20"])
        (view,) = views_of(config)
        assert view.text.length == 24


class TestHashing:
    def test_an_example_is_the_same_each_time_and_says_what_it_is(self):
        views = views_of("lsh:4", length=20)
        first, second = (look(view, 64).shares for view in (views[0], views_of("lsh:4", length=20)[0]))
        assert torch.equal(first, second)
        assert all(view.note.startswith("An example: ") for view in views)

    def test_a_token_sees_itself_only_alone_and_no_future(self):
        both_ways, causal = (look(view, 64).shares > 0 for view in views_of("lsh:2", length=20))
        assert not both_ways.diagonal().any()
        assert torch.equal(causal, causal.tril()) and causal.any(-1).all()
        assert torch.equal(causal.tril(-1), both_ways.tril(-1))


class TestViews:
    def test_both_ways_are_drawn_where_both_can_be(self):
        assert [view.where for view in views_of(["full", "prefix_lm"], prefix=0)] == ["both ways", "causal", "causal"]
        assert [view.where for view in views_of("chunked:4,before=1,cyclic=true")] == ["both ways"]

    def test_heads_that_see_otherwise_have_pictures_of_their_own(self):
        views = views_of("fixed:6,groups=2", is_causal=True, num_heads=5)
        assert [view.where for view in views] == ["causal, heads 0, 2, 4", "causal, heads 1, 3"]

    def test_a_form_is_drawn_by_its_distinct_layers(self):
        patterns = ["full", {"name": "strided", "stride": 3, "heads": "split"}]
        sides = {
            "encoder": {"num_hidden_layers": 3},
            "decoder": {"num_hidden_layers": 5, "attention_patterns": patterns},
        }
        views = views_of(tiny("encoder_decoder", **sides))
        assert [(view.title, view.where) for view in views] == [
            ("full", "encoder, both ways, layers 0-2"),
            ("full", "decoder, causal, layers 0, 2, 4"),
            ("strided:3,heads=split", "decoder, causal, layers 1, 3, head 0"),
            ("strided:3,heads=split", "decoder, causal, layers 1, 3, heads 1-2"),
        ]

    def test_random_blocks_are_those_of_the_layer_that_is_named(self):
        patterns = ["full", "big_bird:2,random=1"]
        _, view = views_of(tiny("decoder", num_hidden_layers=4, attention_patterns=patterns))
        assert view.pattern == parse("big_bird:2,random=1").at_layer(1)
        assert view.note.endswith("these are layer 1's.")

    @pytest.mark.parametrize(
        ("spec", "length", "note"),
        [
            ("sliding_window:8", 8, "Texts of up to 9 tokens are seen whole."),
            ("sliding_window:8", 32, ""),
            ("local_global:2", 32, "No token is global here: none is marked."),
            ("local_global:2,tokens=1", 32, ""),
            ("big_bird:2,random=0", 32, ""),
        ],
    )
    def test_what_would_mislead_is_said(self, spec, length, note):
        assert views_of(spec, length=length, is_causal=False)[0].note == note

    @pytest.mark.parametrize(
        ("numbers", "words"), [([3], "layer 3"), ([0, 1, 2, 5], "layers 0-2, 5"), ([1, 3], "layers 1, 3")]
    )
    def test_numbers_are_written_as_spans(self, numbers, words):
        assert spans("layer", numbers) == words

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"length": 0}, "`length=0` must lie between 1 and 16384"),
            ({"length": 16385}, "`length=16385` must lie between"),
            ({"num_heads": 0}, "`num_heads=0`"),
            ({"marked": [3]}, "read by 'local_global'"),
            ({"prefix": 3}, "read by 'prefix_lm'"),
            ({"documents": [3, 0]}, "must have 1 token each"),
            ({"documents": [3, 4], "length": 8}, "`length=8` beside `documents=[3, 4]` of 7 tokens"),
            ({"documents": [LONGEST_AT_ONCE, 1]}, "too long for a pack of documents: at most 4096"),
            ({"subject": "lsh:4", "length": LONGEST_AT_ONCE + 1}, "too long for an example of 'lsh'"),
            ({"subject": "local_global:2", "length": 9, "marked": [9]}, "`marked=9` (--global) is no place"),
            ({"subject": "prefix_lm", "length": 9, "prefix": 10}, "must lie between 0 and the 9 tokens"),
            ({"subject": "prefix_lm", "is_causal": False}, "use 'full'"),
            ({"subject": "chunked:4,cyclic=true"}, "add `before=1`"),
            ({"subject": "strded:4"}, "Did you mean 'strided'?"),
            ({"subject": variform.VariformDecoderConfig(), "is_causal": True}, "are for patterns"),
            ({"subject": variform.VariformDecoderConfig(), "num_heads": 2}, "are for patterns"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused_by_name(self, options, message):
        with pytest.raises(ValueError) as refusal:
            views_of(options.pop("subject", "full"), **options)
        assert message in str(refusal.value)


class TestWords:
    def test_a_legend_counts_keys_and_their_share(self):
        (view,) = views_of("sliding_window:2", length=5, is_causal=True)
        assert legend(look(view, 64), view.text) == ["60% of causal full", "1 to 2 keys a query, mean 1.8"]
        (view,) = views_of("full", length=6, is_causal=False)
        assert legend(look(view, 3), view.text) == ["100% of full", "6 keys a query", "a cell is 2 x 2 pairs"]

    def test_pictures_stand_side_by_side_where_there_is_room(self):
        views = views_of("sliding_window:8")
        assert "both ways" in (line := printed(views).splitlines()[1]) and "causal" in line
        assert max(map(len, printed(views, width=100).splitlines())) <= 100
        assert "causal" not in printed(views, width=50).splitlines()[1]

    @pytest.mark.parametrize("width", [20, 41, 66])
    def test_a_picture_fits_a_narrow_terminal(self, width):
        lines = printed(views_of("strided:9", length=61, is_causal=True), width).splitlines()
        drawn = [line for line in lines if line.startswith("│")]
        size = -(-61 // (width - 2))
        cells = -(-61 // size)
        assert len(drawn) == -(-cells // 2) and {len(line.rstrip()) for line in drawn} == {cells + 2}
        assert "…" not in " ".join(drawn)

    def test_every_word_of_a_small_picture_is_printed(self):
        said = " ".join(printed(views_of("local_global:2", length=3, is_causal=True)).split())
        assert "1 to 2 keys a query, mean 1.7" in said and "No token is global here: none is marked." in said

    def test_a_title_may_need_several_lines(self):
        view = View("lsh:4,rounds=2,chunked=true,chunk=8,seed=7", "both ways", parse("full"), Text(8, False))
        (axes,) = draw_patterns(view.title, length=16, is_causal=False).axes
        assert axes.get_title().replace("\n", "") == view.title
        assert max(map(len, axes.get_title().splitlines())) <= 26


class TestFiles:
    def test_a_figure_is_written_as_a_png_of_few_colours(self, tmp_path):
        path = tmp_path / "drawn.png"
        figure = draw_patterns(["full", "strided:4"], length=16, columns=3, path=path)
        picture = Image.open(path)
        assert len(figure.axes) == 4 and picture.format == "PNG" and picture.mode == "P"
        assert abs(picture.width - 160 * figure.get_figwidth()) <= 1

    @pytest.mark.parametrize(
        ("name", "error", "message"),
        [("drawn.jpg", ValueError, "must end in '.png'"), ("no/drawn.png", FileNotFoundError, "there is no folder")],
    )
    def test_a_path_that_cannot_be_written_is_refused(self, tmp_path, name, error, message):
        with pytest.raises(error, match=message):
            draw_patterns("full", path=tmp_path / name)
        assert list(tmp_path.iterdir()) == []

    def test_without_matplotlib_the_package_to_install_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(ImportError, match=r"pip install 'variform\[train\]'"):
            draw_patterns("full")
