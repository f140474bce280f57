//! Nodes that load one blob at the same time, on the policy's own code. What it stands in for is
//! the network, and time.
//!
//! Each node reads the blob in order and fetches ahead, [`JOBS`] groups at once, half of them
//! scattered, and takes a group from its parent chunk by chunk, while that still gets it.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::time::Duration;

use weightfs_swarm::{
    Answer, Desk, Fallback, GROUP_BYTES, Group, Health, Here, Inquiry, Limits, Node, Now, Quest,
    Role, Scatter, Step, Uploads, Urgency, View, Way, homes,
};

use crate::links::{FlowId, Links};

/// Chunks of a group: what a node can give on as soon as it has it.
const CHUNKS: u8 = 4;
const CHUNK_BYTES: f64 = GROUP_BYTES as f64 / CHUNKS as f64;

/// Groups that a node fetches at once for itself.
const JOBS: usize = 16;

/// How long who gets nothing waits before it asks somebody else.
const STALL: f64 = 2.0;

/// How long a dead node takes to be found dead.
const NO_ANSWER: f64 = 0.5;

/// The blob's name.
const BLOB: u64 = 0x5eed;

/// Nodes, blob, links, and what happens to some of them.
#[derive(Debug, Clone)]
pub struct Options {
    pub nodes: usize,
    /// Groups of the blob.
    pub groups: usize,
    /// Bytes a second of a node's link, each way.
    pub line: f64,
    /// What the registry serves, in node lines.
    pub registry_lines: f64,
    /// Seconds of a round trip.
    pub round_trip: f64,
    /// The share of nodes that die in the first half of the load.
    pub churn: f64,
    /// The share of nodes whose line is a tenth.
    pub slow: f64,
    /// The share of nodes that begin only after a quarter of an ideal load.
    pub late: f64,
    pub seed: u64,
}

impl Options {
    /// Seconds that a load takes at the least: all of it over a node's own line.
    pub fn ideal(&self) -> f64 {
        self.groups as f64 * GROUP_BYTES as f64 / self.line
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Outcome {
    /// Seconds from its start until each node had all, sorted; without those that died or are slow.
    pub times: Vec<f64>,
    /// Blobs that left the registry.
    pub egress: f64,
    /// Questions that a node asked, on average.
    pub questions: f64,
    /// Nodes that lived and did not get all.
    pub unfinished: usize,
}

type JobId = usize;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    Start {
        node: usize,
    },
    Die {
        node: usize,
    },
    /// The job looks what to do next.
    Go {
        node: usize,
        job: JobId,
        round: u64,
    },
    Asked {
        node: usize,
        job: JobId,
        round: u64,
        peer: usize,
        pull: bool,
    },
    Arrived {
        node: usize,
        job: JobId,
        round: u64,
        peer: usize,
    },
    Refused {
        node: usize,
        job: JobId,
        round: u64,
        peer: usize,
    },
    Silent {
        node: usize,
        job: JobId,
        round: u64,
        peer: usize,
    },
    Sent {
        flow: FlowId,
        version: u64,
    },
    Stalled {
        node: usize,
        job: JobId,
        round: u64,
        chunk: u8,
    },
}

/// An event and its time in nanoseconds; of one time, the one that was foreseen first.
#[derive(Debug, Clone, Copy)]
struct Due {
    time: u64,
    id: u64,
    event: Event,
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.time, self.id).cmp(&(other.time, other.id))
    }
}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Due {}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Searching,
    From { peer: usize, flow: FlowId },
    FromRegistry { way: Way, flow: FlowId },
}

struct Job {
    group: usize,
    urgency: Urgency,
    quest: Quest,
    place: Place,
    /// Counts what the job does: events of earlier rounds mean nothing.
    round: u64,
    /// What was answered, and is on its way: by whom, and whether it was to pull.
    answer: Option<(usize, bool, Answer)>,
}

struct Member {
    up: bool,
    dead: bool,
    slow: bool,
    started: f64,
    finished: Option<f64>,
    /// Chunks that are here of each group, from its first on.
    here: Vec<u8>,
    unstarted: Vec<u32>,
    jobs: HashMap<JobId, Job>,
    job_of: HashMap<usize, JobId>,
    own_jobs: usize,
    next_job: JobId,
    /// Jobs, with their rounds, that wait here for the next chunk of a group.
    waiting: HashMap<usize, Vec<(usize, JobId, u64)>>,
    desk: Desk,
    uploads: Uploads,
    health: Health,
    fallback: Fallback,
    scatter: Scatter,
    random: fastrand::Rng,
    questions: u64,
}

pub struct World {
    options: Options,
    now: f64,
    events: BinaryHeap<Reverse<Due>>,
    next_event: u64,
    links: Links,
    /// Whose flow it is.
    owners: HashMap<FlowId, (usize, JobId)>,
    nodes: Vec<Member>,
    keys: Vec<Node>,
    index: HashMap<Node, usize>,
    homes: Vec<Vec<Node>>,
    egress: f64,
}

impl World {
    pub fn new(options: Options) -> Self {
        let mut random = fastrand::Rng::with_seed(options.seed);
        let keys: Vec<_> = (0..options.nodes).map(|_| Node(random.u64(..))).collect();
        let index = keys.iter().enumerate().map(|(at, key)| (*key, at)).collect();
        let homes = (0..options.groups).map(|at| homes(group(at), keys.iter().copied())).collect();
        let count = |share: f64| (share * options.nodes as f64).round() as usize;
        let mut order: Vec<_> = (0..options.nodes).collect();
        random.shuffle(&mut order);
        let (slow, order) = order.split_at(count(options.slow));
        let (dying, order) = order.split_at(count(options.churn));
        let late = &order[..count(options.late).min(order.len())];
        let line = |node: usize| options.line * if slow.contains(&node) { 0.1 } else { 1.0 };
        let both = (0..options.nodes).flat_map(|node| [line(node), line(node)]);
        let links = Links::new(both.chain([options.line * options.registry_lines]));
        let nodes = (0..options.nodes)
            .map(|node| Member::new(&options, keys[node], slow.contains(&node), random.u64(..)))
            .collect();
        let mut world = Self {
            now: 0.0,
            events: BinaryHeap::new(),
            next_event: 0,
            links,
            owners: HashMap::new(),
            nodes,
            keys,
            index,
            homes,
            egress: 0.0,
            options,
        };
        let ideal = world.options.ideal();
        for node in 0..world.nodes.len() {
            let wait = if late.contains(&node) { ideal / 4.0 } else { 0.0 };
            // Nobody starts in the very same instant.
            world.at(wait + random.f64() * 0.01, Event::Start { node });
        }
        for node in dying {
            world.at(ideal / 2.0 * random.f64(), Event::Die { node: *node });
        }
        world
    }

    pub fn run(mut self) -> Outcome {
        let give_up = self.options.ideal() * 100.0;
        while let Some(Reverse(Due { time, event, .. })) = self.events.pop() {
            self.now = time as f64 / 1e9;
            if self.now > give_up {
                break;
            }
            self.handle(event);
            self.foresee();
        }
        let counted = || self.nodes.iter().filter(|node| node.up && !node.slow);
        let mut times: Vec<_> =
            counted().filter_map(|node| Some(node.finished? - node.started)).collect();
        times.sort_unstable_by(f64::total_cmp);
        let blob = self.options.groups as f64 * GROUP_BYTES as f64;
        let questions = self.nodes.iter().map(|node| node.questions).sum::<u64>();
        Outcome {
            egress: self.egress / blob,
            questions: questions as f64 / self.nodes.len() as f64,
            unfinished: counted().count() - times.len(),
            times,
        }
    }

    fn at(&mut self, time: f64, event: Event) {
        let id = self.next_event;
        self.next_event += 1;
        self.events.push(Reverse(Due { time: (time * 1e9) as u64, id, event }));
    }

    fn soon(&mut self, wait: f64, event: Event) {
        self.at(self.now + wait, event);
    }

    fn foresee(&mut self) {
        for (flow, version, end) in self.links.take_changed() {
            self.at(end, Event::Sent { flow, version });
        }
    }

    fn time(&self) -> Now {
        Duration::from_secs_f64(self.now)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Start { node } => {
                self.nodes[node].up = true;
                self.nodes[node].started = self.now;
                self.start_jobs(node);
            }
            Event::Die { node } => self.die(node),
            Event::Go { node, job, round } => {
                if self.is_current(node, job, round) {
                    self.take_answer(node, job);
                    self.step(node, job);
                }
            }
            Event::Asked { node, job, round, peer, pull } => {
                if self.is_current(node, job, round) {
                    self.answer(node, job, peer, pull);
                }
            }
            Event::Arrived { node, job, round, peer } => {
                if self.is_current(node, job, round) {
                    self.admit(node, job, peer);
                }
            }
            Event::Refused { node, job, round, peer } => {
                if self.is_current(node, job, round) {
                    let (now, key) = (self.time(), self.keys[peer]);
                    self.job(node, job).quest.refused(key, now);
                    self.step(node, job);
                }
            }
            Event::Silent { node, job, round, peer } => {
                if self.is_current(node, job, round) {
                    self.found_dead(node, job, peer);
                    self.step(node, job);
                }
            }
            Event::Sent { flow, version } => {
                if self.owners.contains_key(&flow) && self.links.version(flow) == version {
                    self.chunk_came(flow);
                }
            }
            Event::Stalled { node, job, round, chunk } => {
                let current = self.is_current(node, job, round);
                if current && self.here(node, job) == chunk {
                    let Place::From { peer, .. } = self.job(node, job).place else { return };
                    self.leave(node, job);
                    let (now, key) = (self.time(), self.keys[peer]);
                    self.job(node, job).quest.refused(key, now);
                    self.step(node, job);
                }
            }
        }
    }

    fn is_current(&self, node: usize, job: JobId, round: u64) -> bool {
        let member = &self.nodes[node];
        member.up && member.jobs.get(&job).is_some_and(|job| job.round == round)
    }

    fn job(&mut self, node: usize, job: JobId) -> &mut Job {
        self.nodes[node].jobs.get_mut(&job).expect("it is current")
    }

    /// Chunks of its group that the job's node has.
    fn here(&self, node: usize, job: JobId) -> u8 {
        let member = &self.nodes[node];
        member.here[member.jobs[&job].group]
    }

    /// Begins as many jobs as the node does at once.
    fn start_jobs(&mut self, node: usize) {
        while self.nodes[node].own_jobs < JOBS && !self.nodes[node].unstarted.is_empty() {
            let member = &mut self.nodes[node];
            let at = member.scatter.next(member.unstarted.len());
            let urgency = if at == 0 { Urgency::Ahead } else { Urgency::Background };
            let group = member.unstarted.remove(at) as usize;
            member.own_jobs += 1;
            self.start_job(node, group, urgency);
        }
    }

    fn start_job(&mut self, node: usize, group: usize, urgency: Urgency) {
        let now = self.time();
        let member = &mut self.nodes[node];
        let job = member.next_job;
        member.next_job += 1;
        member.job_of.insert(group, job);
        let quest = Quest::new(self::group(group), urgency, now, vec![]);
        let (place, round, answer) = (Place::Searching, 0, None);
        member.jobs.insert(job, Job { group, urgency, quest, place, round, answer });
        self.step(node, job);
    }

    /// The job's next step.
    fn step(&mut self, node: usize, job: JobId) {
        let (now, me) = (self.time(), self.keys[node]);
        let Self { nodes, keys, index, options, .. } = self;
        let Member { jobs, health, fallback, random, .. } = &mut nodes[node];
        let Some(found) = jobs.get_mut(&job) else { return };
        found.round += 1;
        let round = found.round;
        let view = View { me, members: keys, health };
        let hop = options.round_trip / 2.0;
        match found.quest.next(view, fallback, random, now) {
            Step::Ask { peer, pull } => {
                let peer = index[&peer];
                self.nodes[node].questions += 1;
                self.soon(hop, Event::Asked { node, job, round, peer, pull });
            }
            Step::Look => {
                let inquiry = self.inquiry(node, job, true);
                let answer = self.nodes[node].desk.locate_own(&inquiry);
                self.job(node, job).quest.answered(me, true, answer, now);
                self.step(node, job);
            }
            Step::Fetch { peer } => {
                let peer = index[&peer];
                self.soon(hop, Event::Arrived { node, job, round, peer });
            }
            Step::Wait(time) => self.soon(time.as_secs_f64(), Event::Go { node, job, round }),
            Step::Registry(way) => {
                let flow = self.links.open(2 * self.nodes.len(), 2 * node + 1);
                self.owners.insert(flow, (node, job));
                self.job(node, job).place = Place::FromRegistry { way, flow };
                self.links.send(flow, CHUNK_BYTES, self.now);
            }
        }
    }

    /// A peer answers the job's question.
    fn answer(&mut self, node: usize, job: JobId, peer: usize, pull: bool) {
        let (round, round_trip) = (self.job(node, job).round, self.options.round_trip);
        if self.nodes[peer].dead {
            self.soon(NO_ANSWER, Event::Silent { node, job, round, peer });
            return;
        }
        let (group, urgency) = (self.job(node, job).group, self.job(node, job).urgency);
        let inquiry = self.inquiry(node, job, pull);
        let (key, now) = (self.keys[peer], self.time());
        let homes = &self.homes[group];
        let member = &mut self.nodes[peer];
        // As it sees things: those that don't answer are passed over.
        let is_home = match homes.iter().all(|home| member.health.is_usable(*home, now)) {
            true => homes.contains(&key),
            false => {
                let usable = self.keys.iter().filter(|node| member.health.is_usable(**node, now));
                weightfs_swarm::homes(self::group(group), usable.copied()).contains(&key)
            }
        };
        // Who starts late answers, but has nothing to do with the blob yet.
        let role = match (is_home, member.up) {
            (true, true) => Role::Home,
            (true, false) => Role::Registrar,
            (false, _) => Role::Stranger,
        };
        let here = match member.here[group] {
            CHUNKS => Here::Whole,
            _ if member.is_getting(group) => Here::Coming,
            _ => Here::Nothing,
        };
        let has_room = member.uploads.has_room(inquiry.asker, urgency);
        let answer = member.desk.locate(&inquiry, here, role, has_room);
        self.job(node, job).answer = Some((peer, pull, answer));
        self.soon(round_trip / 2.0, Event::Go { node, job, round });
    }

    /// What the job asks for.
    fn inquiry(&self, node: usize, job: JobId, pull: bool) -> Inquiry {
        let Job { group, quest, .. } = &self.nodes[node].jobs[&job];
        Inquiry {
            group: self::group(*group),
            bytes: bytes_of(*group, self.here(node, job)),
            asker: self.keys[node],
            pull,
            except: quest.except().to_vec(),
            gone: quest.gone().to_vec(),
        }
    }

    fn take_answer(&mut self, node: usize, job: JobId) {
        let now = self.time();
        let Some((peer, pull, answer)) = self.job(node, job).answer.take() else { return };
        let key = self.keys[peer];
        self.nodes[node].health.well(key, now);
        self.job(node, job).quest.answered(key, pull, answer, now);
    }

    fn found_dead(&mut self, node: usize, job: JobId, peer: usize) {
        let (now, key) = (self.time(), self.keys[peer]);
        self.nodes[node].health.failed(key, now);
        self.job(node, job).quest.failed(key);
    }

    /// A peer gives the job what it wants, or refuses.
    fn admit(&mut self, node: usize, job: JobId, peer: usize) {
        let round = self.job(node, job).round;
        if self.nodes[peer].dead {
            self.soon(NO_ANSWER, Event::Silent { node, job, round, peer });
            return;
        }
        let (group, urgency) = (self.job(node, job).group, self.job(node, job).urgency);
        let (key, asker) = (self.keys[peer], self.keys[node]);
        let member = &mut self.nodes[peer];
        let has_some = member.here[group] > self.nodes[node].here[group];
        let member = &mut self.nodes[peer];
        // Who gets nothing itself must not have others wait for it, or all would wait for each
        // other; a home pulls.
        let pulls = !has_some && !member.is_getting(group);
        let possible = !pulls || member.up && self.homes[group].contains(&key);
        if !possible || !member.uploads.admit(asker, urgency) {
            self.soon(self.options.round_trip / 2.0, Event::Refused { node, job, round, peer });
            return;
        }
        if pulls && !member.job_of.contains_key(&group) {
            member.unstarted.retain(|other| *other as usize != group);
            self.start_job(peer, group, urgency);
        }
        let flow = self.links.open(2 * peer, 2 * node + 1);
        self.owners.insert(flow, (node, job));
        self.job(node, job).place = Place::From { peer, flow };
        self.send_next(node, job);
    }

    /// The next chunk of the job's group: sent, or waited for.
    fn send_next(&mut self, node: usize, job: JobId) {
        let now = self.now;
        let (group, here) = (self.job(node, job).group, self.here(node, job));
        let place = self.job(node, job).place;
        match place {
            Place::Searching => {}
            Place::FromRegistry { flow, .. } => self.links.send(flow, CHUNK_BYTES, now),
            Place::From { peer, flow } if self.nodes[peer].here[group] > here => {
                self.links.send(flow, CHUNK_BYTES, now);
            }
            Place::From { peer, flow } => {
                self.links.pause(flow, now);
                let round = self.job(node, job).round;
                self.nodes[peer].waiting.entry(group).or_default().push((node, job, round));
                self.soon(STALL, Event::Stalled { node, job, round, chunk: here });
            }
        }
    }

    fn chunk_came(&mut self, flow: FlowId) {
        let (node, job) = self.owners[&flow];
        let now = self.time();
        let found = self.job(node, job);
        let (group, place) = (found.group, found.place);
        found.quest.progressed(now);
        if matches!(place, Place::FromRegistry { .. }) {
            self.egress += CHUNK_BYTES;
        }
        self.nodes[node].here[group] += 1;
        // Who waits for it here goes on.
        for waiting in self.nodes[node].waiting.remove(&group).unwrap_or_default() {
            let (child, job, round) = waiting;
            if self.is_current(child, job, round) {
                self.send_next(child, job);
            }
        }
        if self.nodes[node].here[group] < CHUNKS {
            self.send_next(node, job);
            return;
        }
        self.leave(node, job);
        let member = &mut self.nodes[node];
        member.jobs.remove(&job);
        member.job_of.remove(&group);
        member.own_jobs = member.own_jobs.saturating_sub(1);
        if member.here.iter().all(|here| *here == CHUNKS) {
            member.finished.get_or_insert(self.now);
        }
        self.start_jobs(node);
    }

    /// The job takes nothing more from where it is.
    fn leave(&mut self, node: usize, job: JobId) {
        let (time, key) = (self.time(), self.keys[node]);
        let place = std::mem::replace(&mut self.job(node, job).place, Place::Searching);
        let flow = match place {
            Place::Searching => return,
            Place::From { peer, flow } => {
                self.nodes[peer].uploads.done(key);
                flow
            }
            Place::FromRegistry { way, flow } => {
                if way == Way::Fallback {
                    self.nodes[node].fallback.ended(true, time);
                }
                flow
            }
        };
        self.owners.remove(&flow);
        self.links.close(flow, self.now);
    }

    /// A node is gone, with all that it gave and got.
    fn die(&mut self, node: usize) {
        (self.nodes[node].up, self.nodes[node].dead) = (false, true);
        let own: Vec<_> = self.nodes[node].jobs.keys().copied().collect();
        own.into_iter().for_each(|job| self.leave(node, job));
        let children: Vec<_> = self.owners.values().copied().collect();
        for (child, job) in children {
            let from = self.nodes[child].jobs.get(&job).map(|job| job.place);
            if matches!(from, Some(Place::From { peer, .. }) if peer == node) {
                self.leave(child, job);
                self.found_dead(child, job, node);
                self.step(child, job);
            }
        }
    }
}

impl Member {
    /// Whether chunks of a group come in.
    fn is_getting(&self, group: usize) -> bool {
        let job = self.job_of.get(&group).and_then(|job| self.jobs.get(job));
        job.is_some_and(|job| job.place != Place::Searching)
    }

    fn new(options: &Options, key: Node, slow: bool, seed: u64) -> Self {
        Self {
            up: false,
            dead: false,
            slow,
            started: f64::INFINITY,
            finished: None,
            here: vec![0; options.groups],
            unstarted: (0..u32::try_from(options.groups).unwrap_or(u32::MAX)).collect(),
            jobs: HashMap::new(),
            job_of: HashMap::new(),
            own_jobs: 0,
            next_job: 0,
            waiting: HashMap::new(),
            desk: Desk::new(key),
            uploads: Uploads::new(Limits::default()),
            health: Health::default(),
            fallback: Fallback::default(),
            scatter: Scatter::new(seed),
            random: fastrand::Rng::with_seed(seed),
            questions: 0,
        }
    }
}

fn group(number: usize) -> Group {
    Group { blob: BLOB, number: number as u64 }
}

/// What is missing of a group of which so many chunks are here.
fn bytes_of(group: usize, here: u8) -> std::ops::Range<u64> {
    let start = group as u64 * GROUP_BYTES;
    start + u64::from(here) * (GROUP_BYTES / u64::from(CHUNKS))..start + GROUP_BYTES
}
