"""The network under torch.compile, torch.export and ONNX: the same logits, at every stride and size."""

import itertools
import re

import pytest
import torch
from torch.export import Dim

from seg_attn.models import DeepLabV3

EVERYWHERE = {
    "attention": {"blocks": "eca", "layer2": "self", "layer4": "se", "skip": "cbam", "aspp": "ms_cam", "decoder": "sk"},
    "image_pooling": "attention",
    "skip_strides": (8, 4),
    "residual_fusion": "aff",
    "fusion": "iaff",
}
VARIANTS = {
    "plain": {"skip_strides": ()},
    "default": {},
    "concat": {"fusion": "concat", "separable": True, "align_corners": True},
    "everywhere": EVERYWHERE,
}


def build(variant, randomise, backbone="resnet18"):
    """Return a network of random weights whose float32 logits are good to 1e-5: without the smaller gates below,
    eight AFF in a row are steps, and eager float32 itself is up to 2e-2 from float64."""
    torch.manual_seed(0)
    model = randomise(DeepLabV3(backbone, num_classes=3, decoder_channels=16, **VARIANTS[variant]))
    for name, tensor in model.state_dict().items():
        if re.search(r"fusion.*_att2?\.[34]\.weight$", name) and tensor.ndim > 1:
            tensor.mul_(0.03)
    return model


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_compiled(model, backend, x, error, strides=(16, 8)):
    """Each stride agrees with eager; a change on model or compiled form is seen; a known stride is not rebuilt."""
    compiled = torch.compile(model, backend=backend)
    frames = torch._dynamo.utils.counters["stats"]
    eager, logits = {}, {}
    with torch.no_grad():
        for output_stride in strides:
            model.output_stride = output_stride
            eager[output_stride], logits[output_stride] = model(x), compiled(x)
            assert error(logits[output_stride], eager[output_stride]) <= 1e-4
        seen = frames["unique_graphs"]
        for output_stride in strides:
            compiled.output_stride = output_stride
            assert model.output_stride == output_stride
            assert error(compiled(x), eager[output_stride]) <= 1e-4
    assert frames["unique_graphs"] == seen
    # And there was something to miss.
    for output_stride, other in itertools.permutations(strides, 2):
        assert error(logits[output_stride], eager[other]) > 1e-2


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_model_sees_a_change_of_stride(randomise, images, error):
    check_compiled(build("default", randomise), "aot_eager", images(1, 3, 65, 97).float(), error)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_training_step_sees_a_change_of_stride(images, error):
    torch.manual_seed(0)
    model = DeepLabV3("resnet18", num_classes=3, decoder_channels=16, skip_strides=(), dropout=0.0).train()
    compiled = torch.compile(model, backend="aot_eager")
    x = images(2, 3, 33, 49).float()

    def gradient(network):
        model.zero_grad()
        network(x).square().mean().backward()
        return model.backbone.layer4[1].conv1.weight.grad.clone()

    gradients = {}
    for output_stride in (16, 8):
        model.output_stride = output_stride
        gradients[output_stride] = gradient(model)
        assert error(gradient(compiled), gradients[output_stride]) <= 1e-4
    assert error(gradients[8], gradients[16]) > 1e-2


@pytest.mark.exhaustive
@pytest.mark.usefixtures("fresh_dynamo")
# Random gates in every block amplify rounding: that network is compared in float64.
@pytest.mark.parametrize(("variant", "dtype"), [("default", torch.float32), ("everywhere", torch.float64)])
def test_inductor_sees_a_change_of_stride(variant, dtype, randomise, images, error):
    model = build(variant, randomise).to(dtype)
    check_compiled(model, "inductor", images(1, 3, 65, 97).to(dtype), error, strides=(16, 8, 32))


def check_exported(model, images, error):
    """One exported program serves other sizes and batches than the one it was traced with."""
    dynamic = {"images": {0: Dim("batch", min=1, max=16), 2: Dim("height", min=65), 3: Dim("width", min=65)}}
    program = torch.export.export(model, (images(2, 3, 65, 97).float(),), dynamic_shapes=dynamic)
    for shape in ((1, 3, 129, 71), (3, 3, 66, 98), (2, 3, 65, 250)):
        x = images(*shape).float()
        with torch.no_grad():
            assert error(program.module()(x), model(x)) <= 1e-5


def test_export_at_another_size(randomise, images, error):
    check_exported(build("everywhere", randomise), images, error)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("variant", "backbone", "output_stride"),
    [
        *itertools.product(VARIANTS, ["resnet18"], [8, 32]),
        *itertools.product(["default"], ["resnet50", "se_resnet50", "se_resnext50_32x4d"], [16, 32]),
    ],
)
def test_export_of_every_variant(variant, backbone, output_stride, randomise, images, error):
    model = build(variant, randomise, backbone)
    model.output_stride = output_stride
    check_exported(model, images, error)


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")  # the exporter's own deprecations
def test_onnx_at_another_size(variant, randomise, images, error, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = build(variant, randomise)
    path = tmp_path / "model.onnx"
    dynamic = {"images": {0: Dim("batch", min=1, max=16), 2: Dim("height", min=65), 3: Dim("width", min=65)}}
    torch.onnx.export(model, (images(2, 3, 65, 97).float(),), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(1, 3, 129, 71).float()
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert error(torch.from_numpy(logits), model(x)) <= 1e-4
