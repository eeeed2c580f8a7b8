//! A world around host: the real daemon, and doubles of warden, the KMS and each slot's vmctl,
//! on their real sockets. The doubles assert what must never be asked of them.
#![allow(dead_code, clippy::unwrap_used)]

mod parts;

pub use parts::until;

use api::audit::{Lease, Object};
use api::disk::Anchored;
use api::host::{Actual, ActualState, Changes, Desired, Op};
use api::kms::AnchorStatement;
use api::rpc::Client;
use api::vmctl::VmState;
use api::warden::{MemoryEnd, SlotState, Start};
use api::{Error, ErrorCode, kms, vmctl, warden};
use model::{HostId, ObjectId, Power, Purpose, Resources, StartId, WorkspaceId};
use parts::{at_rest, attestation, close, is_there, net};
use serde_json::{Value, json};
use service::clock::Clock;
use service::config::Config;
use service::paths::Paths;
use service::rpc::{Peer, Uids, bind, ok, serve};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// The image's digest.
pub fn image() -> String {
    "0a".repeat(32)
}

/// One slot of the doubles.
pub struct Slot {
    pub at: warden::Slot,
    pub vm: VmState,
    pub reason: Option<String>,
    pub open: Option<Vec<warden::Open>>,
    /// Memory that is being saved or woken: its purpose, its object once granted, and whether it
    /// is written.
    pub memory: Option<(Purpose, Option<String>, bool)>,
    /// Which snapshot or archive that is.
    pub id: Option<ObjectId>,
    vmctl: watch::Sender<bool>,
}

/// What the doubles know.
#[derive(Default)]
pub struct State {
    pub slots: BTreeMap<u16, Slot>,
    pub templates: BTreeSet<(String, u32, u32)>,
    pub disks: BTreeSet<WorkspaceId>,
    /// Memory at rest, and the object whose key it is under.
    pub memory: BTreeMap<WorkspaceId, String>,
    /// Archives and parts of snapshots, by the object whose key each is under.
    pub objects: BTreeSet<(WorkspaceId, &'static str, ObjectId)>,
    /// The snapshots that the KMS was told of.
    pub kept: Vec<(WorkspaceId, ObjectId)>,
    pub nonces: BTreeSet<String>,
    /// What the KMS was told of each disk.
    pub anchors: BTreeMap<WorkspaceId, Vec<kms::Anchor>>,
    /// Reads that every disk refused.
    pub refused: u64,
    /// Operations that fail, by `process.op`.
    pub failing: BTreeMap<String, ErrorCode>,
    /// An operation after which no answer comes.
    pub silent: Option<String>,
    /// Every operation asked but looks at the state.
    pub asked: Vec<String>,
}

pub struct Doubles {
    paths: Paths,
    state: Mutex<State>,
    stop: watch::Sender<bool>,
}

impl Doubles {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn serve(self: &Arc<Self>) {
        self.process("warden", "warden", "warden", self.stop.subscribe());
        self.process("kms", "kms", "kms", self.stop.subscribe());
    }

    fn process(
        self: &Arc<Self>,
        process: &'static str,
        dir: &str,
        name: &str,
        stopped: watch::Receiver<bool>,
    ) {
        let me = rustix::process::getuid().as_raw();
        let uids = Arc::new(Uids::from_map([("host".to_owned(), me)].into()));
        let listener = bind(&self.paths.socket(dir, name)).unwrap();
        let slot = name.parse::<u16>().unwrap_or(0);
        let doubles = Arc::clone(self);
        let handler = move |_: Peer, _: String, op: Value| {
            let doubles = Arc::clone(&doubles);
            async move { doubles.gate(process, slot, op).await }
        };
        tokio::spawn(serve(listener, uids, &["host"], stopped, handler));
    }

    async fn gate(self: Arc<Self>, process: &str, slot: u16, op: Value) -> api::Result<Value> {
        let name = format!("{process}.{}", op["op"].as_str().unwrap());
        let failing = self.state().failing.get(&name).copied();
        if let Some(code) = failing {
            self.note(&name);
            return Err(Error::new(code, "the test wants it so"));
        }
        let answered = match process {
            "warden" => self.warden(serde_json::from_value(op).unwrap()),
            "kms" => self.kms(serde_json::from_value(op).unwrap()),
            _ => self.vmctl(slot, serde_json::from_value(op).unwrap()),
        };
        self.note(&name);
        let silent = self.state().silent.as_deref() == Some(&name);
        if silent {
            std::future::pending::<()>().await;
        }
        answered
    }

    fn note(&self, name: &str) {
        if !name.ends_with(".status") {
            self.state().asked.push(name.to_owned());
        }
    }

    fn warden(self: &Arc<Self>, op: warden::Op) -> api::Result<Value> {
        let mut s = self.state();
        match op {
            warden::Op::Status => ok(&warden::Status {
                host: HostId::from_bytes([9; 8]),
                cgroup: "v1".into(),
                accel: "tcg: here".into(),
                slots: s.slots.values().map(|s| s.at.clone()).collect(),
                templates: s.templates.iter().cloned().collect(),
                weakened: vec![],
            }),
            warden::Op::VmOpen {
                slot,
                how,
                image,
                memory_mb,
                cpus,
            } => {
                if s.slots.contains_key(&slot) {
                    return Err(Error::new(ErrorCode::Conflict, "the slot is taken"));
                }
                if how == Start::Template {
                    assert!(s.templates.contains(&(image.clone(), memory_mb, cpus)));
                }
                let net = net(slot);
                let (stop, stopped) = watch::channel(false);
                let at = warden::Slot {
                    slot,
                    workspace: None,
                    start_id: None,
                    state: SlotState::Open,
                    how,
                    image,
                    memory_mb,
                    cpus,
                    vmm_pid: 1,
                    disk_pid: None,
                    vmctl_pid: 2,
                    net: net.clone(),
                };
                let vm = VmState::Created;
                s.slots.insert(
                    slot,
                    Slot {
                        at,
                        vm,
                        reason: None,
                        open: None,
                        memory: None,
                        id: None,
                        vmctl: stop,
                    },
                );
                drop(s);
                self.process("vmctl", "vmctl", &slot.to_string(), stopped);
                ok(&net)
            }
            warden::Op::TemplateSeal { slot } => {
                let at = &s.slots[&slot].at;
                assert_eq!(at.how, Start::Build);
                let shape = (at.image.clone(), at.memory_mb, at.cpus);
                s.templates.insert(shape);
                close(&mut s, slot);
                ok(&true)
            }
            warden::Op::DiskOpen {
                slot,
                workspace,
                start_id,
                nonce,
                from,
                ..
            } => {
                let fresh = s.disks.insert(workspace.clone());
                let elsewhere = s
                    .slots
                    .values()
                    .any(|x| x.at.slot != slot && x.at.workspace.as_ref() == Some(&workspace));
                assert!(!elsewhere, "the workspace is on a slot already");
                let x = s.slots.get_mut(&slot).unwrap();
                let vm = match x.at.how {
                    Start::Wake => VmState::Created,
                    _ => VmState::Pooled,
                };
                assert_eq!((x.at.state, x.vm), (SlotState::Open, vm));
                assert_ne!(x.at.how, Start::Build);
                x.at.state = SlotState::DiskWaits;
                (x.at.workspace, x.at.start_id) = (Some(workspace.clone()), Some(start_id));
                ok(&warden::DiskOpened {
                    attestation: attestation(&nonce, Purpose::Disk, &workspace),
                    fresh,
                    from: from.map(|of| {
                        assert!(is_there(&s, &of.workspace, Purpose::SnapshotDisk, &of.id));
                        attestation(&nonce, Purpose::SnapshotDisk, &of.workspace)
                    }),
                })
            }
            warden::Op::DiskGrant {
                slot, sealed, from, ..
            } => {
                let x = s.slots.get_mut(&slot).unwrap();
                assert_eq!(x.at.state, SlotState::DiskWaits);
                let start = x.at.start_id.clone().unwrap();
                assert_eq!(sealed, format!("{start}|disk|"));
                x.at.state = SlotState::DiskAttached;
                let used = x.memory.take().map(|(purpose, ..)| purpose);
                let workspace = x.at.workspace.clone().unwrap();
                if used == Some(Purpose::Memory) {
                    s.memory.remove(&workspace);
                }
                if let Some(from) = from {
                    let object = from.sealed.split('|').nth(2).unwrap().parse().unwrap();
                    let copied = |(_, p, o): &(WorkspaceId, &str, ObjectId)| {
                        *p == Purpose::SnapshotDisk.label() && *o == object
                    };
                    assert!(s.objects.iter().any(copied), "a copy of what is not there");
                }
                ok(&true)
            }
            warden::Op::SnapshotDiskOpen { slot, nonce, .. } => {
                let x = &s.slots[&slot];
                assert_eq!(
                    (x.at.state, x.vm),
                    (SlotState::DiskAttached, VmState::Paused)
                );
                let workspace = x.at.workspace.as_ref().unwrap();
                ok(&warden::Attested {
                    attestation: attestation(&nonce, Purpose::SnapshotDisk, workspace),
                })
            }
            warden::Op::SnapshotDiskGrant {
                slot, id, sealed, ..
            } => {
                let x = &s.slots[&slot];
                assert_eq!(x.vm, VmState::Paused, "a disk is copied while it changes");
                let workspace = x.at.workspace.clone().unwrap();
                assert_eq!(sealed.split('|').nth(2), Some(id.as_str()));
                s.objects
                    .insert((workspace, Purpose::SnapshotDisk.label(), id));
                ok(&true)
            }
            warden::Op::MemoryOpen {
                slot,
                workspace,
                start_id,
                purpose,
                nonce,
                save: true,
                id,
                size_mb,
            } => {
                let x = s.slots.get_mut(&slot).unwrap();
                let vm = match purpose {
                    Purpose::Archive => VmState::Running,
                    _ => VmState::Paused,
                };
                assert_eq!((x.at.state, x.vm), (SlotState::DiskAttached, vm));
                assert_eq!(size_mb.is_some(), purpose == Purpose::Archive);
                assert_eq!(id.is_some(), purpose.is_by_id());
                assert_eq!(x.at.workspace.as_ref(), Some(&workspace));
                assert_ne!(x.at.start_id.as_ref(), Some(&start_id));
                assert!(x.memory.is_none(), "one save at a time");
                (x.memory, x.id) = (Some((purpose, None, false)), id);
                ok(&warden::Attested {
                    attestation: attestation(&nonce, purpose, &workspace),
                })
            }
            warden::Op::MemoryOpen {
                slot,
                workspace,
                purpose: Purpose::Archive,
                nonce,
                id,
                ..
            } => {
                if !is_there(&s, &workspace, Purpose::Archive, &id.unwrap()) {
                    return Err(Error::new(ErrorCode::NotFound, "no such archive"));
                }
                let x = s.slots.get_mut(&slot).unwrap();
                assert_eq!((x.vm, &x.memory), (VmState::Running, &None));
                x.memory = Some((Purpose::Archive, None, false));
                ok(&warden::Attested {
                    attestation: attestation(&nonce, Purpose::Archive, &workspace),
                })
            }
            warden::Op::MemoryOpen {
                slot,
                workspace,
                start_id,
                purpose,
                nonce,
                id,
                ..
            } => {
                let there = match &id {
                    Some(id) => is_there(&s, &workspace, purpose, id),
                    None => s.memory.contains_key(&workspace),
                };
                assert!(there && !s.slots.contains_key(&slot));
                let on = |x: &Slot| x.at.workspace.as_ref() == Some(&workspace);
                assert!(
                    !s.slots.values().any(on),
                    "the workspace is on a slot already"
                );
                let attested = attestation(&nonce, purpose, &workspace);
                let at = warden::Slot {
                    slot,
                    workspace: Some(workspace),
                    start_id: Some(start_id),
                    state: SlotState::MemoryWaits,
                    how: Start::Wake,
                    image: image(),
                    memory_mb: 256,
                    cpus: 1,
                    vmm_pid: 0,
                    disk_pid: None,
                    vmctl_pid: 0,
                    net: net(slot),
                };
                let (vmctl, _) = watch::channel(false);
                let waits = Slot {
                    at,
                    vm: VmState::Created,
                    reason: None,
                    open: None,
                    memory: Some((purpose, None, false)),
                    id,
                    vmctl,
                };
                s.slots.insert(slot, waits);
                ok(&warden::Attested {
                    attestation: attested,
                })
            }
            warden::Op::MemoryGrant { slot, sealed, .. } => {
                let object = sealed.split('|').nth(2).unwrap().to_owned();
                let x = s.slots.get_mut(&slot).unwrap();
                let workspace = x.at.workspace.clone().unwrap();
                let wakes = x.at.state == SlotState::MemoryWaits;
                let memory = x.memory.as_mut().unwrap();
                memory.1 = Some(object.clone());
                if wakes {
                    let (stop, stopped) = watch::channel(false);
                    (x.at.state, x.vmctl) = (SlotState::Open, stop);
                    let id = x.id.as_ref().map(|id| id.to_string());
                    if id.as_ref().unwrap_or_else(|| &s.memory[&workspace]) != &object {
                        return Err(Error::new(ErrorCode::KeyRefused, "another object's key"));
                    }
                    drop(s);
                    self.process("vmctl", "vmctl", &slot.to_string(), stopped);
                }
                ok(&warden::Memory {
                    image: image(),
                    memory_mb: 256,
                    cpus: 1,
                    net: net(slot),
                })
            }
            warden::Op::MemoryEnd { slot, end } => {
                let x = s.slots.get_mut(&slot).unwrap();
                let workspace = x.at.workspace.clone().unwrap();
                let Some((purpose, object, written)) = x.memory.take() else {
                    return Err(Error::new(ErrorCode::Conflict, "nothing is being saved"));
                };
                if end == MemoryEnd::Drop {
                    return ok(&true);
                }
                assert!(written, "what was not written is kept");
                if let Some(id) = x.id.take() {
                    assert_eq!(object.unwrap(), id.as_str());
                    s.objects.insert((workspace, purpose.label(), id));
                    return ok(&true);
                }
                s.memory.insert(workspace, object.unwrap());
                if end == MemoryEnd::Sleep {
                    close(&mut s, slot);
                }
                ok(&true)
            }
            warden::Op::ObjectErase {
                workspace,
                purpose,
                id,
            } => {
                let on = |x: &Slot| x.at.workspace.as_ref() == Some(&workspace);
                match id {
                    Some(id) => _ = s.objects.remove(&(workspace, purpose.label(), id)),
                    None => {
                        assert!(!s.slots.values().any(on), "no VM comes from what is erased");
                        s.memory.remove(&workspace);
                    }
                }
                ok(&true)
            }
            warden::Op::Objects { workspace } => ok(&at_rest(&s, &workspace)),
            warden::Op::NetSet { slot, open, .. } => {
                let x = s.slots.get_mut(&slot).unwrap();
                let up = matches!(x.vm, VmState::Running | VmState::Paused);
                assert!(up || x.at.how != Start::Wake, "open before it reseeded");
                x.open = Some(open);
                ok(&true)
            }
            warden::Op::DiskAnchor { slot, end } => {
                let Some(x) = s.slots.get_mut(&slot) else {
                    return Err(Error::new(ErrorCode::NotFound, "the slot is empty"));
                };
                if end {
                    x.at.state = SlotState::Dead;
                }
                let (Some(workspace), Some(start_id)) =
                    (x.at.workspace.clone(), x.at.start_id.clone())
                else {
                    return ok(&None::<Anchored>);
                };
                // The start's own, and one more at its end.
                let anchor = kms::Anchor {
                    run: u64::from_str_radix(&start_id.as_str()[3..], 16).unwrap(),
                    batch: if end { 2 } else { 1 },
                    root: "5a".repeat(32),
                };
                ok(&Some(Anchored {
                    statement: AnchorStatement {
                        workspace,
                        anchor,
                        mac: "6b".repeat(32),
                    },
                    refused: s.refused,
                    first_refused: None,
                }))
            }
            warden::Op::SlotClose { slot } => {
                close(&mut s, slot);
                ok(&true)
            }
            warden::Op::DiskErase { workspace } => {
                assert!(
                    s.slots
                        .values()
                        .all(|x| x.at.workspace.as_ref() != Some(&workspace))
                );
                s.disks.remove(&workspace);
                ok(&true)
            }
            warden::Op::Counters { .. } => ok(&warden::Counters::default()),
        }
    }

    fn kms(&self, op: kms::Op) -> api::Result<Value> {
        let (receipt, attestation) = match op {
            kms::Op::Release {
                receipt,
                attestation,
            } => (receipt, attestation),
            kms::Op::Anchor { statement } => {
                let mut s = self.state();
                let now = statement.anchor;
                let id = statement.workspace;
                s.anchors.entry(id).or_default().push(now.clone());
                return ok(&now);
            }
            kms::Op::SnapshotKeep { workspace, object } => {
                self.state().kept.push((workspace, object));
                return ok(&true);
            }
            _ => panic!("host asks for releases only, and carries anchors and what stands"),
        };
        let lease: Lease = serde_json::from_value(receipt["lease"].clone()).unwrap();
        let object = lease
            .objects()
            .find(|o| attestation == self::attestation(&lease.nonce, o.purpose, &o.workspace));
        let object = object.expect("what is attested is of this lease");
        assert!(
            self.state().nonces.insert(attestation),
            "a lease is used twice: an alarm"
        );
        let id = object.id.map(|id| id.to_string()).unwrap_or_default();
        ok(&kms::Released {
            sealed: format!("{}|{}|{id}", lease.start_id, object.purpose.label()),
            aad: "00".into(),
        })
    }

    fn vmctl(&self, slot: u16, op: vmctl::Op) -> api::Result<Value> {
        let mut s = self.state();
        let x = s.slots.get_mut(&slot).unwrap();
        match op {
            vmctl::Op::Status => {}
            vmctl::Op::Prepare | vmctl::Op::PrepareNow => {
                assert_eq!(x.vm, VmState::Created);
                x.vm = VmState::Pooled;
            }
            vmctl::Op::Save => return ok(&true),
            vmctl::Op::Attach { attach, .. } => {
                assert_eq!(
                    (x.at.state, x.vm),
                    (SlotState::DiskAttached, VmState::Pooled)
                );
                assert!(x.open.is_some(), "a guest runs without rules");
                assert_eq!(attach.ip, x.at.net.ip);
                x.vm = VmState::Running;
                return ok(&api::agent::Up {
                    kernel: "6.12".into(),
                    steps: Vec::new(),
                });
            }
            vmctl::Op::MemorySave => {
                assert_eq!(x.vm, VmState::Paused);
                let memory = x.memory.as_mut().unwrap();
                assert!(memory.1.is_some(), "memory is written without a key");
                memory.2 = true;
            }
            vmctl::Op::Archive { .. } | vmctl::Op::Unarchive { .. } => {
                assert_eq!(x.vm, VmState::Running);
                let memory = x.memory.as_mut().unwrap();
                assert!(memory.1.is_some(), "an archive is moved without a key");
                memory.2 = true;
                let (bytes, entries, skipped) = (10_240, 3, 0);
                return ok(&vmctl::Archived {
                    bytes,
                    entries,
                    skipped,
                });
            }
            vmctl::Op::Wake { wake, .. } => {
                assert_eq!(
                    (x.at.state, x.vm),
                    (SlotState::DiskAttached, VmState::Created)
                );
                assert!(x.open.is_none(), "open before it reseeded");
                assert_eq!(wake.ip, x.at.net.ip);
                x.vm = VmState::Running;
                return ok(&api::agent::Up {
                    kernel: "6.12".into(),
                    steps: Vec::new(),
                });
            }
            vmctl::Op::Pause => {
                assert_eq!(x.vm, VmState::Running);
                x.vm = VmState::Paused;
            }
            vmctl::Op::Resume => {
                assert_eq!(x.vm, VmState::Paused);
                x.vm = VmState::Running;
            }
            vmctl::Op::Shutdown { grace_ms } => {
                assert!(grace_ms > 0);
                x.vm = VmState::Exited;
                x.reason = Some("shutdown".into());
            }
        }
        ok(&vmctl::Status {
            vm: x.vm,
            reason: x.reason.clone(),
        })
    }
}

/// One machine.
pub struct World {
    pub paths: Paths,
    pub config: Config,
    pub doubles: Arc<Doubles>,
    pub clock: Clock,
    pub client: Client,
    host: Option<Runtime>,
    generation: u64,
    starts: u64,
    /// The snapshots that stand.
    pub snapshots: BTreeMap<u8, ObjectId>,
    _dir: tempfile::TempDir,
}

impl World {
    pub async fn new(pool_size: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        for process in ["host", "kms", "warden", "vmctl"] {
            std::fs::create_dir_all(paths.run().join(process)).unwrap();
        }
        std::fs::create_dir_all(paths.state("host")).unwrap();
        std::fs::create_dir_all(paths.artifacts()).unwrap();
        let manifest = json!({ "images": [{ "name": "python-3", "id": image() }] });
        std::fs::write(
            paths.artifacts().join("manifest.json"),
            manifest.to_string(),
        )
        .unwrap();
        let me = rustix::process::getuid().as_raw();
        let uids = json!({ "control": me, "edge": me });
        std::fs::write(paths.uids(), uids.to_string()).unwrap();
        let doubles = Arc::new(Doubles {
            paths: paths.clone(),
            state: Mutex::default(),
            stop: watch::Sender::new(false),
        });
        doubles.serve();
        let mut config = Config::default();
        config.host.pool_size = pool_size;
        config.host.max_running = 4;
        let mut world = Self {
            client: Client::new(paths.socket("host", "host")),
            paths,
            config,
            doubles,
            clock: Clock::manual(1_800_000_000_000),
            host: None,
            generation: 0,
            starts: 0,
            snapshots: BTreeMap::new(),
            _dir: dir,
        };
        world.start().await;
        world
    }

    /// Starts host in a runtime of its own, and waits until it answers.
    pub async fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (paths, config, clock) = (self.paths.clone(), self.config.clone(), self.clock.clone());
        runtime.spawn(async move {
            let (stop, stopped) = watch::channel(false);
            if let Err(e) = host::run(&paths, &config, clock, stopped).await {
                eprintln!("host: {e:#}");
            }
            drop(stop);
        });
        self.host = Some(runtime);
        let client = self.client.clone();
        until("host answers", async || {
            client.call::<_, Value>("t", &Op::List).await.ok()
        })
        .await;
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.host.take() {
            runtime.shutdown_background();
        }
    }

    /// A desired state of workspace `n`, newer than any before; with a fresh lease if it is to run.
    pub fn wish(&mut self, n: u8, power: Power) -> Desired {
        self.generation += 1;
        let workspace = WorkspaceId::from_bytes([n; 8]);
        let mut desired = Desired {
            workspace: workspace.clone(),
            generation: self.generation,
            power,
            image: image(),
            resources: Resources::default(),
            disk_bytes_per_s: 1 << 30,
            disk_ops_per_s: 1_000,
            net_rates: warden::NetRates::default(),
            pids: 0,
            config: "{}".into(),
            public_access: false,
            ingress_ports: vec![],
            wakes: false,
            archive: None,
            archives: vec![],
            snapshot: self.snapshots.get(&n).cloned(),
            snapshot_next: None,
            lease: None,
            start: None,
            token_state: "v1.x".into(),
        };
        if power == Power::Running {
            desired = self.with_lease(desired, &[(n, Purpose::Disk, 0)]);
        }
        desired
    }

    /// The same wish with a fresh lease that opens these objects: whose, what, and its number.
    pub fn with_lease(&mut self, mut desired: Desired, opens: &[(u8, Purpose, u8)]) -> Desired {
        self.starts += 1;
        let object = |(n, purpose, id): &(u8, Purpose, u8)| Object {
            workspace: WorkspaceId::from_bytes([*n; 8]),
            purpose: *purpose,
            id: (*purpose != Purpose::Disk).then(|| ObjectId::from_bytes([*id; 8])),
        };
        let own = object(&opens[0]);
        let lease = Lease {
            workspace: own.workspace,
            host: HostId::from_bytes([9; 8]),
            start_id: StartId::from_bytes(self.starts.to_be_bytes()),
            purpose: own.purpose,
            nonce: format!("{:064x}", self.starts),
            exp_ms: self.clock.now_ms() + 50_000,
            config_digest: "00".repeat(32),
            object: own.id,
            also: opens[1..].iter().map(object).collect(),
        };
        desired.lease = Some(json!({ "lease": lease }));
        desired.start = Some(lease);
        desired
    }

    /// Wishes under such a lease, and waits for it.
    pub async fn act(&mut self, n: u8, power: Power, opens: &[(u8, Purpose, u8)]) -> Actual {
        let wish = self.wish(n, power);
        let wish = self.with_lease(wish, opens);
        self.apply(wish).await.unwrap()
    }

    /// Applies, and waits for it.
    pub async fn apply(&self, desired: Desired) -> api::Result<Actual> {
        let op = Op::Apply {
            desired: Box::new(desired),
            wait_ms: 30_000,
        };
        self.client
            .call_within("t", &op, Duration::from_secs(40))
            .await
    }

    /// Wishes, and waits for it.
    pub async fn bring(&mut self, n: u8, power: Power) -> Actual {
        let wish = self.wish(n, power);
        self.apply(wish).await.unwrap()
    }

    pub async fn get(&self, n: u8) -> Option<Actual> {
        let op = Op::Get {
            workspace: WorkspaceId::from_bytes([n; 8]),
        };
        self.client.call("t", &op).await.ok()
    }

    pub async fn changes(&self, since: u64) -> Changes {
        self.client
            .call("t", &Op::Changes { since, wait_ms: 0 })
            .await
            .unwrap()
    }

    /// Waits until workspace `n` is in a state.
    pub async fn becomes(&self, n: u8, state: ActualState) -> Actual {
        until(&format!("{state:?}"), async || {
            self.get(n).await.filter(|a| a.state == state)
        })
        .await
    }

    /// Slots that hold workspace `n`.
    pub fn slots_of(&self, n: u8) -> Vec<u16> {
        let id = WorkspaceId::from_bytes([n; 8]);
        let s = self.doubles.state();
        let of = s
            .slots
            .values()
            .filter(|x| x.at.workspace.as_ref() == Some(&id));
        of.map(|x| x.at.slot).collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}
