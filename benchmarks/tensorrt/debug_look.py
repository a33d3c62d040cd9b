import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parents[2]))
from divergence.probes.tensorrt.process import Worker
from divergence.demo import write_bundled, inputs
from divergence.probes.onnx.probe import OnnxProbe
w=Path('/tmp/dbg'); w.mkdir(exist_ok=True); write_bundled('clean', w/'c.onnx')
g,l,f,n=OnnxProbe(w/'c.onnx').locate()
groups={'hidden0':[x.value for x in f if x.site.tensor=='hidden'][:1],'key0':[x.value for x in f if x.site.tensor=='key'][:1],'value0':[x.value for x in f if x.site.tensor=='value'][:1],'hidden':[x.value for x in f if x.site.tensor=='hidden'],'key':[x.value for x in f if x.site.tensor=='key'],'all':[x.value for x in f]}
for name,vals in groups.items():
    with Worker() as k:
        try:
            r=k.call('divergence.probes.tensorrt.builder:build',{'model':str(w/'c.onnx'),'out':str(w/f'{name}.plan'),'values':vals,'look':'debug','precision':'fp32','level':0,'profiles':{k2:[[list(t.shape)]*3] for k2,t in inputs().items()}},about=name)
            print(name,'built',r['lost'])
            from divergence.probes.tensorrt.probe import TensorRTProbe
            seen={}
            fx=TensorRTProbe(w/f'{name}.plan').run(inputs(),lambda o:seen.__setitem__(str(o.site),o.tensor.abs().mean().item()))
            print(' ran',seen)
        except Exception as e: print(name,str(e)[-300:])
