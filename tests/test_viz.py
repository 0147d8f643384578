"Pictures: right colours, right places, whatever kind of array comes in; no figure or style is left behind."
import base64, subprocess, sys
import matplotlib.pyplot as plt, numpy as np, pytest, torch
from mem_nb import viz
from mem_nb.events import make_events
from mem_nb.viz import (BRIGHTER, DARKER, HIDDEN, fig_to_base64, frame_to_rgb, show_codebook, show_confusion, show_curves, show_events, show_frame,
                        show_frames, show_label_curve, show_mask, show_rate, show_reconstructions, show_tokens, token_colors)
from matplotlib.colors import to_rgb

@pytest.fixture(autouse=True)
def closed():
    before = dict(plt.rcParams); yield
    assert dict(plt.rcParams)==before, 'the style leaked'
    plt.close('all')

def frames(b=3, c=3, size=(12,16), seed=0): return np.random.default_rng(seed).random((b,c,*size))

def test_import_needs_no_torch():
    told = subprocess.run([sys.executable, '-c', 'import sys, mem_nb.viz; print("torch" in sys.modules)'], capture_output=True, text=True)
    assert told.stdout.strip()=='False', told.stderr

# ---- colour
def test_colours_of_single_events():
    f = np.zeros((3,1,4)); f[0,0,1] = f[2,0,2] = f[0,0,3] = f[2,0,3] = 5
    white,red,blue,both = frame_to_rgb(f)[0]
    assert np.allclose(white, 1) and np.allclose(red, to_rgb(BRIGHTER)) and np.allclose(blue, to_rgb(DARKER))
    assert np.allclose(both, (red+blue)/2)

def test_time_surface_does_not_show():
    f = frames(1)[0]; g = f.copy(); g[1] = 0
    assert (frame_to_rgb(f)==frame_to_rgb(g)).all()

@pytest.mark.parametrize('c', [1,2,3,5,10])
def test_any_number_of_channels(c):
    rgb = frame_to_rgb(frames(1,c)[0]-.5*(c>3))
    assert rgb.shape==(12,16,3) and rgb.min()>=0 and rgb.max()<=1

def test_voxel_grids_show_their_sign():
    f = np.zeros((5,1,2)); f[2,0,0],f[3,0,1] = 2,-2
    assert np.allclose(frame_to_rgb(f)[0], [to_rgb(BRIGHTER), to_rgb(DARKER)])

def test_scale_and_negative_values():
    f = frames(1)[0]
    assert np.allclose(frame_to_rgb(f), frame_to_rgb(f*7)) and not np.allclose(frame_to_rgb(f), frame_to_rgb(f, vmax=9))
    assert np.allclose(frame_to_rgb(np.full((2,3,3), -1.)), 1) and np.allclose(frame_to_rgb(np.zeros((2,3,3))), 1)
    assert frame_to_rgb(f, vmax=.01).min()>=0                      # beyond full colour

@pytest.mark.parametrize('kind', [np.float32, np.uint8, np.int64])
def test_kinds_of_numbers(kind): assert np.isfinite(frame_to_rgb((frames(1)[0]*9).astype(kind))).all()

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_with_gradients_are_welcome(dtype):
    f = torch.from_numpy(frames(1)[0]).to(dtype).requires_grad_()
    assert np.allclose(frame_to_rgb(f), frame_to_rgb(f.detach().float().numpy()))

def test_a_frame_has_three_axes():
    with pytest.raises(ValueError, match=r'\(C, H, W\)'): frame_to_rgb(np.zeros((4,4)))

def test_every_token_has_its_own_colour():
    c = token_colors(8192); assert c.shape==(8192,3) and len(np.unique(c, axis=0))==8192 and c.min()>=0 and c.max()<=1

# ---- pictures
def test_mask_covers_the_hidden_patches_and_no_others():
    mask = torch.zeros(12, dtype=torch.bool); mask[[0,7]] = True
    cover = show_mask(frames(1)[0], mask, (3,4)).images[1]
    a = np.asarray(cover.get_array())
    assert (a[...,3].reshape(-1)==mask.numpy()).all() and np.allclose(a[0,0,:3], to_rgb(HIDDEN))
    assert tuple(cover.get_extent())==(-.5,15.5,11.5,-.5)          # the whole frame
    two = show_mask(frames(1)[0], mask.reshape(3,4).numpy(), (3,4)).images[1]
    assert (np.asarray(two.get_array())==a).all()

def test_tokens_keep_their_order():
    image = np.asarray(show_tokens(torch.arange(6), (2,3), 6).images[0].get_array())
    assert np.allclose(image.reshape(6,3), token_colors(6))

def test_frames_fill_a_grid_row_by_row():
    fig = show_frames(torch.from_numpy(frames(5)), list('abcde'), cols=3)
    shown = [a for a in fig.axes if a.images]
    assert len(fig.axes)==6 and [a.get_title() for a in shown]==list('abcde')
    assert np.allclose(shown[4].images[0].get_array(), frame_to_rgb(frames(5)[4]))

def test_show_frame_draws_into_given_axes():
    fig,axs = plt.subplots(1,2)
    assert show_frame(frames(1)[0], axs[1], 'here') is axs[1] and axs[1].get_title()=='here' and not axs[0].images

def test_reconstructions_share_the_scale_of_their_column():
    f = frames(2)
    fig = show_reconstructions({'frame':f, 'half':f/2})
    axs = np.array(fig.axes).reshape(2,2)
    assert [a.get_ylabel() for a in axs[:,0]]==['frame','half']
    assert np.allclose(axs[1,0].images[0].get_array(), frame_to_rgb(f[0]/2, vmax=f[0].max()))
    assert len(show_reconstructions({'frame':frames(12)}, cols=4).axes)==4

def test_events_and_rate():
    n = 5000; e = make_events(np.arange(n)%30, np.arange(n)%20, np.arange(n)*10, np.arange(n)%2)
    ax = show_events(e, n=100); assert len(ax.collections[0].get_offsets())==100 and 't (ms)' in ax.get_xlabel()
    fig = plt.figure(); ax = fig.add_subplot(111, projection='3d'); assert show_events(e[:1], ax=ax) is ax
    assert len(show_rate(e, 1000).patches)==2 and len(show_rate(e[e['p']]).patches)==1

def test_curves_skip_records_without_the_key():
    log = [dict(step=s, loss=1/(s+1), note='x', **({'val_loss':2.} if s%5==0 else {})) for s in range(20)] + [dict(step=20, loss=None)]
    a,b = show_curves(log, ['loss','val_loss']).lines
    assert len(a.get_xdata())==20 and list(b.get_xdata())==[0,5,10,15]
    assert len(show_curves(log, 'nothing').lines[0].get_xdata())==0
    thin,thick = show_curves(log, 'loss', smooth=4).lines
    assert np.std(thick.get_ydata()) < np.std(thin.get_ydata())

def test_smoothing_keeps_a_constant_and_a_straight_line():
    x = np.arange(50.)*3
    assert np.allclose(viz._smoothed(x, np.ones(50), 20), 1)
    assert np.allclose(viz._smoothed(x, x, 20)[5:-5], x[5:-5])      # no lag

def test_confusion():
    m = np.array([[8,2],[1,9]]); ax = show_confusion(torch.from_numpy(m), ['a','b'])
    assert ax.get_title()=='85.0 % right' and (ax.get_xlabel(),ax.get_ylabel())==('said','is')
    assert np.allclose(ax.images[0].get_array(), [[.8,.2],[.1,.9]])
    show_confusion(np.zeros((2,2)), ['a','b']); show_confusion(np.eye(101), [str(i) for i in range(101)])
    with pytest.raises(ValueError, match='3 classes'): show_confusion(m, ['a','b','c'])

def test_label_curve_is_mean_and_std_over_seeds():
    table = [dict(method='pretrained', labels='all' if n==700 else n, n_labels=n, seed=s, accuracy=a) for n,a0 in [(50,.5),(700,.9)] for s,a in enumerate([a0,a0+.02])]
    table += [dict(method='scratch', labels=50, seed=0, accuracy=.25)]
    ax = show_label_curve(table)
    assert np.allclose(ax.lines[0].get_xydata(), [(50,51),(700,91)]) and np.allclose(ax.lines[1].get_xydata(), [(50,25)])
    assert [t.get_text() for t in ax.get_legend().get_texts()]==['pretrained','scratch']

def test_codebook_shows_the_commonest_first():
    decoded = {i:f for i,f in enumerate(frames(6))}                # a mapping with the commonest codes is enough
    fig = show_codebook(decoded, torch.tensor([0,5,1,0,10,4]), n=3, cols=2)
    assert [a.get_title() for a in fig.axes if a.images]==['50.0 %','25.0 %','20.0 %'] and '4 of 6' in fig._suptitle.get_text()

def test_figure_to_text_and_no_figure_left():
    for f in (show_frame(frames(1)[0]), show_frames(frames())):
        assert base64.b64decode(fig_to_base64(f))[:8]==b'\x89PNG\r\n\x1a\n'
    assert not plt.get_fignums()

def test_callers_arrays_are_left_alone():
    f = frames(); before = f.copy(); show_reconstructions({'a':f}); show_frames(f); assert (f==before).all()
