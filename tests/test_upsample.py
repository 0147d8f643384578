"Doubling by fewer products is a transposed convolution."
import pytest, torch
from torch import nn
from mem_nb.tokenizer import EventVAE
from mem_nb.upsample import Upsample, pointwise

@pytest.mark.parametrize('size', [(14,14),(5,9),(1,1),(2,3)])
@pytest.mark.parametrize('last', [False,True])
def test_outputs_and_gradients_are_those_of_torch(size, last, monkeypatch):
    monkeypatch.setattr(Upsample, 'least', 0)
    torch.manual_seed(0)
    ours,torchs,found = Upsample(128, 136),nn.ConvTranspose2d(128, 136, 4, 2, 1),[]
    torchs.load_state_dict(ours.state_dict())
    x,weight = torch.randn(2,128,*size),torch.randn(2,136,2*size[0],2*size[1])
    if last: x = x.contiguous(memory_format=torch.channels_last)
    for layer in (ours, torchs):
        x = x.detach().requires_grad_()
        y = layer(x)
        found.append([y.detach(), *torch.autograd.grad((y*weight).sum(), [x, *layer.parameters()])])
    for a,b in zip(*found): torch.testing.assert_close(a/b.abs().max(), b/b.abs().max(), rtol=0, atol=5e-6)

def test_the_tokenizer_decodes_the_same_by_either(monkeypatch):
    torch.manual_seed(0)
    vae,tokens = EventVAE(3, 32, 16, 128, 2, 1),torch.randint(32, (3,24))
    plain = vae.decode(tokens, (4,6)).detach()
    monkeypatch.setattr(Upsample, 'least', 0)
    torch.testing.assert_close(vae.decode(tokens, (4,6)).detach(), plain, rtol=0, atol=1e-5)

def test_small_frames_and_half_precision_take_the_usual_way():
    layer,x = Upsample(128, 128),torch.randn(1,128,4,4)
    assert 'Double' not in type(layer(x).grad_fn).__name__
    with torch.autocast('cpu', torch.bfloat16): assert layer(x).dtype==torch.bfloat16

def test_pointwise_is_a_convolution():
    conv,x = nn.Conv2d(8, 3, 1),torch.randn(2,8,5,6)
    for format in (torch.contiguous_format,torch.channels_last):
        torch.testing.assert_close(pointwise(x.contiguous(memory_format=format), conv), conv(x))
