//! Links that flows share. Each node has one up and one down, the registry one up.
//!
//! A flow gets an allocation at each of its two ends and runs at the smaller one. A link that
//! changes divides itself anew: who is held back elsewhere gets little more than it can use, the
//! others the rest, in equal parts.
//!
//! Invariant: the allocations of a link never exceed it, so the rates don't either.

/// More than it can use elsewhere, so that it can grow there.
const HEADROOM: f64 = 1.25;

/// Gains of a rate below this share are not worth an event.
const NOTICEABLE: f64 = 0.01;

pub type FlowId = usize;

#[derive(Debug, Clone, Copy)]
pub enum End {
    Up,
    Down,
}

#[derive(Debug, Clone)]
pub struct Flow {
    pub up: usize,
    pub down: usize,
    /// Bytes to go, at `since`.
    left: f64,
    since: f64,
    at_up: f64,
    at_down: f64,
    rate: f64,
    /// Counts the changes of its rate: events of earlier ones mean nothing.
    pub version: u64,
    /// Whether it takes part.
    active: bool,
}

struct Link {
    capacity: f64,
    flows: Vec<FlowId>,
}

pub struct Links {
    links: Vec<Link>,
    flows: Vec<Flow>,
    free: Vec<FlowId>,
    /// Flows whose end must be foreseen anew.
    changed: Vec<FlowId>,
}

impl Links {
    pub fn new(capacities: impl IntoIterator<Item = f64>) -> Self {
        let link = |capacity| Link { capacity, flows: Vec::new() };
        let links = capacities.into_iter().map(link).collect();
        Self { links, flows: Vec::new(), free: Vec::new(), changed: Vec::new() }
    }

    pub fn open(&mut self, up: usize, down: usize) -> FlowId {
        let id = self.free.pop().unwrap_or(self.flows.len());
        let version = self.flows.get(id).map_or(0, |flow| flow.version + 1);
        let (left, since, at_up, at_down, rate) = (0.0, 0.0, 0.0, 0.0, 0.0);
        let flow = Flow { up, down, left, since, at_up, at_down, rate, version, active: false };
        if id == self.flows.len() {
            self.flows.push(flow);
        } else {
            self.flows[id] = flow;
        }
        id
    }

    pub fn close(&mut self, id: FlowId, now: f64) {
        self.pause(id, now);
        self.flows[id].version += 1;
        self.free.push(id);
    }

    pub fn version(&self, id: FlowId) -> u64 {
        self.flows[id].version
    }

    /// So many more bytes.
    pub fn send(&mut self, id: FlowId, bytes: f64, now: f64) {
        let flow = &mut self.flows[id];
        (flow.left, flow.since) = (bytes, now);
        if flow.active {
            self.changed.push(id);
            return;
        }
        flow.active = true;
        (flow.at_up, flow.at_down) = (f64::INFINITY, f64::INFINITY);
        let (up, down) = (flow.up, flow.down);
        self.links[up].flows.push(id);
        self.links[down].flows.push(id);
        self.divide(up, End::Up, now);
        self.divide(down, End::Down, now);
        self.divide(up, End::Up, now);
    }

    /// Nothing to send for the moment.
    pub fn pause(&mut self, id: FlowId, now: f64) {
        let flow = &mut self.flows[id];
        if !flow.active {
            return;
        }
        flow.active = false;
        flow.rate = 0.0;
        let (up, down) = (flow.up, flow.down);
        for link in [up, down] {
            self.links[link].flows.retain(|other| *other != id);
        }
        self.divide(up, End::Up, now);
        self.divide(down, End::Down, now);
    }

    /// Flows whose rate has changed, with their version and when they are through.
    pub fn take_changed(&mut self) -> Vec<(FlowId, u64, f64)> {
        let mut changed = std::mem::take(&mut self.changed);
        changed.sort_unstable();
        changed.dedup();
        let mut ends = Vec::with_capacity(changed.len());
        for id in changed {
            let flow = &mut self.flows[id];
            if flow.active && flow.rate > 0.0 {
                flow.version += 1;
                ends.push((id, flow.version, flow.since + flow.left / flow.rate));
            }
        }
        ends
    }

    fn divide(&mut self, link: usize, end: End, now: f64) {
        let Link { capacity, flows } = &self.links[link];
        let mut wants: Vec<(f64, FlowId)> =
            flows.iter().map(|id| (self.flows[*id].elsewhere(end) * HEADROOM, *id)).collect();
        wants.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
        let (mut left, mut count) = (*capacity, wants.len());
        let mut shares = Vec::with_capacity(count);
        for (want, id) in wants {
            let share = want.min(left / count as f64);
            shares.push((share, id));
            left -= share;
            count -= 1;
        }
        // What nobody can use is there for whoever can use more later.
        let spare = left.max(0.0) / shares.len().max(1) as f64;
        for (share, id) in shares {
            if self.flows[id].allot(end, share + spare, now) {
                self.changed.push(id);
            }
        }
    }
}

impl Flow {
    fn elsewhere(&self, end: End) -> f64 {
        match end {
            End::Up => self.at_down,
            End::Down => self.at_up,
        }
    }

    /// Whether that changes its rate.
    fn allot(&mut self, end: End, share: f64, now: f64) -> bool {
        match end {
            End::Up => self.at_up = share,
            End::Down => self.at_down = share,
        }
        let rate = self.at_up.min(self.at_down);
        let gain = rate - self.rate;
        if !rate.is_finite() || (0.0..self.rate * NOTICEABLE).contains(&gain) {
            return false;
        }
        self.left = (self.left - self.rate * (now - self.since)).max(0.0);
        self.since = now;
        self.rate = rate;
        true
    }
}
