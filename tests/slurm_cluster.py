"""A SLURM of two nodes on this machine, with ports and folders of its own: for the tests and for the cells flagged `slurm`.

    python tests/slurm_cluster.py COMMAND …    # run COMMAND where sbatch reaches it, then stop it
"""
import ctypes, os, shutil, signal, socket, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ('munged','slurmctld','slurmd','sbatch','srun','squeue','scontrol','scancel')
CONF = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=6
KillWait=6
MailProg=/bin/true
PropagateResourceLimits=NONE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=64000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=64000
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 MaxTime=1-00:00:00
PartitionName=high Nodes=n1,n2 PriorityTier=10 MaxTime=1-00:00:00
"""

def absent():
    "Why there can be no SLURM here, in words; '' where there can."
    lacks = [p for p in PROGRAMS if not shutil.which(p, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if lacks: return f"SLURM is not installed ({', '.join(lacks)} not found); as root: apt-get install slurm-wlm munge"
    return '' if os.geteuid()==0 else 'a SLURM of our own can only be started by root'

def free_ports(n):
    "Ports nobody listens on."
    socks = [socket.socket() for _ in range(n)]
    for s in socks: s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in socks]
    for s in socks: s.close()
    return ports

def die_with_parent():
    "Asked of the kernel by a daemon before it begins: TERM when whoever started it is gone, however that ended."
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)   # PR_SET_PDEATHSIG

class Cluster:
    "Daemons of one SLURM, by name; `env` is what a client needs."
    def __init__(self, root):
        self.root,self.procs = Path(root),{}
        for d in ('munge','state','spool-n1','spool-n2'): (self.root/d).mkdir(parents=True)
        for d in (self.root, self.root/'munge'): d.chmod(0o755)
        self.conf = self.root/'slurm.conf'
        self.conf.write_text(CONF.format(host=socket.gethostname().split('.')[0], ports=free_ports(3), root=self.root))
        self.env = dict({k:v for k,v in os.environ.items() if not k.startswith(('SLURM','SBATCH'))}, SLURM_CONF=str(self.conf),
                        PATH=f"{os.environ['PATH']}:/usr/sbin:/sbin")

    def daemon(self, name, *command):
        "Start a daemon in the foreground of a session of its own."
        with open(self.root/f'{name}.out', 'ab') as out:
            self.procs[name] = subprocess.Popen(command, env=self.env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True, cwd=self.root,
                                                preexec_fn=die_with_parent)

    def start(self):
        "Up in some seconds; raises RuntimeError with the daemons' last words."
        m,key = self.root/'munge',self.root/'munge'/'key'
        key.write_bytes(os.urandom(1024)); key.chmod(0o600)
        self.daemon('munged', 'munged', '-F', '--force', '-S', f'{m}/socket', f'--key-file={key}', f'--log-file={m}/log', f'--pid-file={m}/pid', f'--seed-file={m}/seed')
        self.wait(lambda: (m/'socket').exists(), 'munged', 20)
        self.daemon('slurmctld', 'slurmctld', '-D', '-f', str(self.conf))
        for n in ('n1','n2'): self.start_node(n)
        self.wait(self.idle, 'two idle nodes', 60)
        return self

    def start_node(self, name): self.daemon(name, 'slurmd', '-D', '-N', name, '-f', str(self.conf))
    def kill_node(self, name):
        "As if its plug were pulled: the daemon, what it has started for jobs, and the jobs themselves, at one moment."
        mine = [int(p.name) for p in Path('/proc').glob('[0-9]*') if self._on(p, name)]
        for s in (signal.SIGSTOP, signal.SIGKILL):
            for pid in mine:
                try: os.kill(pid, s)
                except ProcessLookupError: pass
        self.procs[name].wait()

    def _on(self, proc, node):
        "Whether a process, as a folder of /proc, belongs to this SLURM and this node."
        try:
            env = (proc/'environ').read_bytes().split(b'\0')
            if f'SLURM_CONF={self.conf}'.encode() not in env: return False
            return f'SLURMD_NODENAME={node}'.encode() in env or any(os.readlink(f)==str(self.root/f'slurmd-{node}.log') for f in (proc/'fd').iterdir())
        except OSError: return False

    def idle(self): return self.ask('sinfo', '-h', '-o', '%D %t').split()==['2','idle']

    def stop(self):
        "Stop the daemons that we started, clients first."
        for name in ('n1','n2','slurmctld','munged'):
            if (p := self.procs.get(name)) and p.poll() is None:
                p.terminate()
                try: p.wait(15)
                except subprocess.TimeoutExpired: p.kill(); p.wait()

    def ask(self, *command): return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout

    def wait(self, ready, what, seconds=60):
        "Wait until `ready()` is true, and give its value; raises RuntimeError, naming `what`."
        for _ in range(5*seconds):   # not by the clock, which goes on while the machine is kept from working
            if value := ready(): return value
            time.sleep(.2)
        tails = '\n'.join(f'--- {p.name}\n{p.read_text(errors="replace")[-1500:]}' for p in sorted(self.root.glob('*.log')))
        raise RuntimeError(f"waited {seconds} s for {what}\n{self.ask('squeue','-l')}{self.ask('sinfo')}{tails}")

@contextmanager
def cluster():
    "A running SLURM, stopped and removed at the end."
    root = tempfile.mkdtemp(prefix='slurm-')
    c = Cluster(root)
    try: yield c.start()
    finally:
        c.ask('scancel', '--user=root')
        end = time.time()+15
        while c.ask('squeue', '-h') and time.time()<end: time.sleep(.3)
        c.stop()
        shutil.rmtree(root, ignore_errors=True)

if __name__ == '__main__':
    if why := absent(): sys.exit(why)
    with cluster() as c: code = subprocess.run(sys.argv[1:], env=c.env).returncode
    sys.exit(code)
