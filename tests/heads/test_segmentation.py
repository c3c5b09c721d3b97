"""Segmentation heads against torchvision's networks and plain forms of the papers' sums."""

import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models.segmentation
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from visiontasks.backbones import CifarResNet, TimmBackbone, TorchvisionBackbone
from visiontasks.cli.command_line import CONF
from visiontasks.contracts import Backbone, Level, UsageError
from visiontasks.heads import FCN, FPN, LRASPP, DeepLabV3, DeepLabV3Plus, SegFormerMLP, SkipFCN, UNet

HEADS = (
    "fcn32s",
    "fcn16s",
    "fcn8s",
    "fcn",
    "deeplabv3",
    "deeplabv3plus",
    "unet",
    "fpn",
    "lraspp",
    "segformer_mlp",
    "segmentation",
)
LEARNT_ENLARGEMENT = ("fcn32s", "fcn16s", "fcn8s")
BACKBONES: dict[str, tuple[type[Backbone], dict[str, Any]]] = {
    "resnet18": (TorchvisionBackbone, {"name": "resnet18"}),
    "resnet18 at 8": (TorchvisionBackbone, {"name": "resnet18", "output_stride": 8}),
    "resnet18 at 16": (TorchvisionBackbone, {"name": "resnet18", "output_stride": 16}),
    "vgg11": (TorchvisionBackbone, {"name": "vgg11"}),
    "mobilenet_v2": (TorchvisionBackbone, {"name": "mobilenet_v2"}),
    "convnext_tiny": (TorchvisionBackbone, {"name": "convnext_tiny"}),
    "densenet121": (TorchvisionBackbone, {"name": "densenet121"}),
    "squeezenet1_1": (TorchvisionBackbone, {"name": "squeezenet1_1"}),
    "googlenet": (TorchvisionBackbone, {"name": "googlenet"}),
    "alexnet": (TorchvisionBackbone, {"name": "alexnet"}),
    "resnet20": (CifarResNet, {"depth": 20}),
    "timm": (TimmBackbone, {"name": "mobilenetv3_small_050"}),
    "one level": (TimmBackbone, {"name": "vit_tiny_patch16_224"}),
}
STRIDES = {  # of unet, of fpn and segformer, of deeplabv3plus, of lraspp, of the coarsest level
    "resnet18 at 8": (4, 4, 4, 8, 8),
    "resnet18 at 16": (4, 4, 4, 8, 16),
    "squeezenet1_1": (4, 4, 4, 8, 16),
    "resnet20": (1, 1, 2, 2, 4),
    "one level": (4, 16, 16, 16, 16),
}
USUAL = (4, 4, 4, 8, 32)
COLUMN = {"segmentation": 0, "unet": 0, "fpn": 1, "segformer_mlp": 1, "deeplabv3plus": 2, "lraspp": 3}
LEVELS = (Level(6, 4), Level(8, 8), Level(10, 16), Level(12, 32))


def make(head: str, levels: tuple[Level, ...], num_classes: int = 3) -> Any:
    return instantiate(OmegaConf.load(CONF / "head" / f"{head}.yaml"))(levels=levels, num_classes=num_classes)


def from_conf(head: str) -> str:
    chosen: Any = OmegaConf.load(CONF / "head" / f"{head}.yaml")
    return str(chosen.defaults[0]) if "defaults" in chosen else head


@cache
def pyramid(backbone: str, height: int = 32, width: int = 64) -> tuple[tuple[Level, ...], list[Tensor]]:
    torch.manual_seed(0)
    kind, options = BACKBONES[backbone]
    network = kind(**options).train()
    with torch.no_grad():
        return network.levels, network(torch.randn(2, 3, height, width).to(memory_format=torch.channels_last))


def random_pyramid(sides: tuple[int, ...] = (16, 8, 4, 2)) -> list[Tensor]:
    return [torch.randn(2, level.channels, side, side + 1) for level, side in zip(LEVELS, sides, strict=True)]


def randomise_norms(module: nn.Module) -> None:
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)


def randomise_scores(head: SkipFCN) -> None:
    for score in head.scores:
        nn.init.normal_(score.weight)  # type: ignore[arg-type]
        nn.init.normal_(score.bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("head", HEADS)
def test_logits_have_the_heads_stride_and_train_every_weight(head: str, backbone: str) -> None:
    levels, features = pyramid(backbone)
    module = make(from_conf(head), levels).train()
    stride = 1 if head in LEARNT_ENLARGEMENT else STRIDES.get(backbone, USUAL)[COLUMN.get(head, 4)]
    factors = torch.randn(2, 3, 32 // stride, 64 // stride)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    for _ in range(2):  # scores that start at zero hold back the gradient of what follows them
        optimizer.zero_grad()
        logits = module(features)
        assert logits.shape == factors.shape
        assert logits.isfinite().all()
        (logits * factors).sum().backward()
        optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.ndim == 1 or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11", "alexnet", "resnet20", "resnet18 at 8"])
@pytest.mark.parametrize("head", HEADS)
def test_images_of_any_size(head: str, backbone: str) -> None:
    levels, features = pyramid(backbone, 75, 93)
    logits = make(from_conf(head), levels)(features)
    sizes = [feature.shape[-2:] for feature in features]
    assert logits.isfinite().all()
    assert head in LEARNT_ENLARGEMENT or logits.shape[-2:] in sizes


@pytest.mark.parametrize("sides", [(13, 7, 4, 2), (13, 6, 3, 1)], ids=["rounded up", "rounded down"])
@pytest.mark.parametrize("head", HEADS)
def test_maps_whose_sizes_are_no_multiples(head: str, sides: tuple[int, ...]) -> None:
    logits = make(from_conf(head), LEVELS).eval()(random_pyramid(sides))
    fine = {"fcn32s": 32 * sides[3], "fcn16s": 16 * sides[2], "fcn8s": 8 * sides[1], "lraspp": sides[1]}
    coarse = dict.fromkeys(("fcn", "deeplabv3"), sides[3])
    assert logits.shape[-2] == {**fine, **coarse}.get(head, 13)


@pytest.mark.parametrize("head", HEADS)
def test_channels_last_stays_so(head: str) -> None:
    levels, features = pyramid("resnet18")
    module = make(from_conf(head), levels).to(memory_format=torch.channels_last)
    assert module(features).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("head", HEADS)
def test_autocast_scores_as_float32_does(head: str) -> None:
    module = make(from_conf(head), LEVELS).eval()
    randomise_norms(module)
    features = random_pyramid()
    expected = module(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(features).float()
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("head", HEADS)
def test_one_batch_is_learnt(head: str) -> None:
    backbone = CifarResNet(depth=8)
    network = nn.ModuleList([backbone, make(from_conf(head), backbone.levels)])
    images = torch.randn(4, 3, 16, 16)
    masks = torch.randint(0, 3, (4, 2, 2)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        logits = F.interpolate(network[1](network[0](images)), size=(16, 16), mode="bilinear")
        loss = F.cross_entropy(logits, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(("name", "head"), [("fcn_resnet50", FCN), ("deeplabv3_resnet50", DeepLabV3)])
def test_torchvisions_networks_give_the_same_logits(name: str, head: Any) -> None:
    network = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    randomise_norms(network)
    network.eval()
    backbone = TorchvisionBackbone(name="resnet50", output_stride=8).eval()
    backbone.net.load_state_dict(network.backbone.state_dict())
    main = head(levels=backbone.levels, num_classes=5).eval()
    main.layers.load_state_dict(network.classifier.state_dict())
    auxiliary = FCN(levels=backbone.levels[:-1], num_classes=5).eval()
    auxiliary.layers.load_state_dict(network.aux_classifier.state_dict())
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        expected = network(images)
        features = backbone(images)
        found = {"out": main(features), "aux": auxiliary(features[:-1])}
    for key, logits in found.items():
        assert expected[key].std() > 0.05
        resized = F.interpolate(logits, size=(65, 97), mode="bilinear", align_corners=False)
        torch.testing.assert_close(resized, expected[key], rtol=1e-4, atol=1e-4)


def test_torchvisions_lraspp_gives_the_same_logits_from_its_features() -> None:
    network = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=5)
    randomise_norms(network)
    network.eval()
    levels = TorchvisionBackbone(name="mobilenet_v3_large", output_stride=16).levels
    head = LRASPP(levels=levels, num_classes=5).eval()
    head.layers.load_state_dict(network.classifier.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = network(images)["out"]
        published = network.backbone(images)
        unused = torch.full((2, 1, 1, 1), torch.nan)
        logits = head([unused, published["low"], unused, published["high"]])
    assert expected.std() > 0.01
    torch.testing.assert_close(F.interpolate(logits, size=(64, 96), mode="bilinear"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [2, 7, 16, 32])
def test_enlargement_starts_as_bilinear_interpolation(stride: int) -> None:
    head = SkipFCN(levels=(Level(4, stride),), num_classes=3, skips=0)
    randomise_scores(head)
    features = torch.randn(2, 4, 5, 6)
    expected = F.interpolate(head.scores[0](features), scale_factor=stride, mode="bilinear", align_corners=False)
    inner = (..., slice(stride, -stride), slice(stride, -stride))
    torch.testing.assert_close(head([features])[inner], expected[inner], rtol=1e-4, atol=1e-5)


def test_fcn8s_adds_the_scores_of_three_strides() -> None:
    head = SkipFCN(levels=LEVELS, num_classes=3, skips=2)
    randomise_scores(head)
    features = random_pyramid((32, 16, 8, 4))
    features = [
        features[0],
        *(torch.randn(2, level.channels, 256 // level.stride, 160 // level.stride) for level in LEVELS[1:]),
    ]
    eighth, sixteenth, coarse = (score(feature) for score, feature in zip(head.scores, features[1:], strict=True))
    expected = F.interpolate(coarse, scale_factor=2, mode="bilinear") + sixteenth
    expected = F.interpolate(expected, scale_factor=2, mode="bilinear") + eighth
    expected = F.interpolate(expected, scale_factor=8, mode="bilinear")
    inner = (..., slice(48, -48), slice(48, -48))
    torch.testing.assert_close(head(features)[inner], expected[inner], rtol=1e-4, atol=1e-4)


def test_scores_start_at_zero() -> None:
    assert torch.equal(SkipFCN(levels=LEVELS, num_classes=3)(random_pyramid()), torch.zeros(2, 3, 64, 72))


def test_segformer_fuses_as_one_matrix_over_all_levels_side_by_side() -> None:
    head = SegFormerMLP(levels=LEVELS, num_classes=3, width=16).eval()
    randomise_norms(head)
    features = random_pyramid()
    linear = [layer(feature) for layer, feature in zip(head.linears, features, strict=True)]
    enlarged = [F.interpolate(x, size=features[0].shape[-2:], mode="bilinear") for x in linear]
    matrix = torch.cat([fusion.weight for fusion in head.fusions], dim=1)  # type: ignore[misc]  # (width, 4 width, 1, 1)
    expected = head.classifier(head.finish(F.conv2d(torch.cat(enlarged, dim=1), matrix)))  # type: ignore[arg-type]
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-5)


def test_fpn_enlarges_each_level_by_two_until_the_finest() -> None:
    head = FPN(levels=LEVELS, num_classes=3, pyramid_width=8, width=32).eval()
    features = [torch.randn(2, level.channels, 64 // level.stride, 96 // level.stride) for level in LEVELS]
    pyramid_levels = list(head.pyramid({str(index): feature for index, feature in enumerate(features)}).values())
    assert [len(list(branch.children())) for branch in head.branches] == [1, 1, 2, 3]
    expected = 0
    for index, x in enumerate(pyramid_levels):
        for convolution, norm, _ in head.branches[index].children():  # type: ignore[misc]
            normed = F.group_norm(F.conv2d(x, convolution.weight, padding=1), 32, norm.weight, norm.bias)
            x = F.interpolate(normed.relu(), scale_factor=2, mode="bilinear") if index else normed.relu()
        expected = expected + x
    torch.testing.assert_close(head(features), head.classifier(expected), rtol=1e-4, atol=1e-5)


def test_unet_joins_each_finer_level() -> None:
    head = UNet(levels=LEVELS, num_classes=3, width=8).eval()
    randomise_norms(head)
    features = [torch.randn(2, level.channels, 64 // level.stride, 96 // level.stride) for level in LEVELS]
    x = features[3]
    for block, skip in zip(head.blocks, features[2::-1], strict=True):
        x = block(torch.cat([x.repeat_interleave(2, 2).repeat_interleave(2, 3), skip], dim=1))
    torch.testing.assert_close(head(features), head.classifier(x))


def test_unet_goes_on_to_the_stride_that_is_asked_for() -> None:
    head = UNet(levels=LEVELS, num_classes=3, stride=1)
    assert [block[0][0].out_channels for block in head.blocks] == [256, 128, 64, 32, 16]  # type: ignore[index]
    assert head(random_pyramid()).shape == (2, 3, 64, 68)


def test_deeplabv3plus_refines_the_pyramid_with_the_finer_level() -> None:
    head = DeepLabV3Plus(levels=LEVELS, num_classes=3, width=16, skip_width=4).eval()
    randomise_norms(head)
    features = random_pyramid()
    pooled = F.interpolate(head.pyramid(features[3]), size=(16, 17), mode="bilinear", align_corners=False)
    joined = torch.cat([pooled, head.reduce(features[0])], dim=1)
    torch.testing.assert_close(head(features), head.classifier(head.refine(joined)))


@pytest.mark.parametrize(("stride", "rates"), [(8, [12, 24, 36]), (16, [6, 12, 18]), (32, [3, 6, 9])])
def test_dilations_follow_the_stride(stride: int, rates: list[int]) -> None:
    head = DeepLabV3(levels=(Level(4, stride),), num_classes=3)
    found = [branch[0].dilation[0] for branch in head.layers[0].convs[1:4]]
    assert found == rates
    given = DeepLabV3(levels=(Level(4, stride),), num_classes=3, rates=[1, 2])
    assert [branch[0].dilation[0] for branch in given.layers[0].convs[1:3]] == [1, 2]


@pytest.mark.parametrize("head", ["deeplabv3", "deeplabv3plus"])
def test_a_batch_of_one_is_named_in_training_only(head: str) -> None:
    module, features = make(head, LEVELS), [feature[:1] for feature in random_pyramid()]
    with pytest.raises(UsageError, match=r"data\.batch_size=2"):
        module(features)
    assert module.eval()(features).isfinite().all()


def test_a_stride_finer_than_the_image_is_refused() -> None:
    with pytest.raises(UsageError, match=r"head\.stride=0.*head\.stride=1"):
        UNet(levels=LEVELS, num_classes=3, stride=0)


@pytest.mark.parametrize("head", HEADS)
def test_heads_serve_segmentation(head: str) -> None:
    assert make(from_conf(head), LEVELS).serves == "segmentation"


def test_classification_waits_for_no_segmentation_head() -> None:
    script = "import sys; from visiontasks.heads import Linear; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
