"""Counts in samples of generators."""

import torch
from torch import Tensor, nn

from benchmarks.attributes import learn, rare, readable
from benchmarks.modes import modes
from benchmarks.pools import STEPS, TIME, rows
from pipelines.models.classifiers import Perceptron
from pipelines.models.network import Generator
from pipelines.shape import ImageShape


def test_a_part_is_rare_that_is_seen_less_than_a_fifth_as_often_as_it_was_drawn() -> None:
    found = torch.tensor([0] * 60 + [1] * 35 + [2] * 5)  # a third of 100 would be 33
    assert rare(found, 3) == [2]
    assert rare(found, 4) == [3]
    assert rare(torch.cat([found, torch.tensor([2, 2])]), 3) == []


def test_a_part_can_be_read_that_is_found_where_it_is_and_rarely_elsewhere() -> None:
    shown = torch.arange(3).repeat_interleave(100)
    assert readable(shown, shown, 3) == [0, 1, 2]
    blind = shown.clone()
    blind[:30] = 1  # of the first part 30 are not found, and as many are mistaken for the second
    assert readable(blind, shown, 3) == [2]
    few = shown.clone()
    few[:10] = 1
    assert readable(few, shown, 3) == [0, 1, 2]


def test_a_reader_learns_what_images_show() -> None:
    torch.manual_seed(3)
    parts = torch.stack([torch.randint(2, (400,)), torch.randint(3, (400,))], 1)
    images = torch.randint(0, 40, (400, 3, 16, 16), dtype=torch.uint8)
    for image, (dark, channel) in zip(images, parts.tolist(), strict=True):
        image[channel, :8] += 100
        image[:, 8:] += 100 * (1 - dark)
    reader = learn(images[:300], parts[:300], [2, 3], epochs=12)
    assert bool((reader.read(images[300:]) == parts[300:]).double().mean(0).gt(0.9).all())


class _Listed(Generator):
    """Returns the images of a list in turn."""

    def __init__(self, images: Tensor) -> None:
        super().__init__(ImageShape(*images.shape[1:]), 2)
        self.images = nn.Parameter(images)
        self.given = 0

    def forward(self, latents: Tensor, conditions: Tensor | None = None) -> Tensor:
        places = torch.arange(self.given, self.given + len(latents))
        self.given += len(latents)
        return self.images[places % len(self.images)]


def test_modes_are_triples_of_digits() -> None:
    """A reader of brightness: class 0 is dark, class 1 bright."""
    reader = Perceptron(ImageShape(1, 2, 2), 10)
    for weights in reader.parameters():
        nn.init.zeros_(weights)
    (linear,) = (module for module in reader.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        linear.weight[0], linear.weight[1] = -1.0, 1.0
    linear.bias.data[2:] = -9.0
    corners = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]) * 2.0 - 1
    generator = _Listed(corners[:, :, None, None].expand(-1, -1, 2, 2).contiguous())
    assert modes(generator, reader, 40) == (3, 3)
    once = torch.cat([generator.images[:2].repeat(3000, 1, 1, 1), generator.images[2:3]]).detach()
    assert modes(_Listed(once), reader, 6001) == (2, 3)


def test_rows_compare_plans_at_equal_steps_and_at_equal_time() -> None:
    at_steps, at_time = {128: 40.0, 256: 36.0, 1024: 30.0, 4096: 32.0}, {128: 20.0, 256: 22.0, 1024: 18.0, 4096: 24.0}
    found = {(STEPS, n): fid for n, fid in at_steps.items()} | {(TIME, n): fid for n, fid in at_time.items()}
    *of_steps, middle, largest = rows(found, (256, 1024, 4096), 1000, "5 CPU minutes")
    assert [(row.ours, row.peer) for row in of_steps] == [(36, 40), (30, 40), (32, 40)]
    assert (middle.ours, middle.peer, middle.met) == (18, 22, True)
    assert (largest.ours, largest.peer, largest.peer_name, largest.met) == (24, 18, "1024", False)
