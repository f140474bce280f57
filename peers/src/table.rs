//! The members, and the policy's state. One lock, never held across I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use weightfs_swarm::{
    Answer, Desk, Fallback, Group, Health, Here, Inquiry, Limits, Node, Now, Quest, Role, Standing,
    Step, Uploads, Urgency, View,
};

use crate::{hash, lock};

/// A member, by what it is called.
pub(crate) fn node_of(name: &str) -> Node {
    Node(hash(name))
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Table {
    epoch: Instant,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    me: Node,
    my_name: Option<Arc<str>>,
    members: Vec<Node>,
    names: BTreeMap<Node, Arc<str>>,
    health: Health,
    desk: Desk,
    uploads: Uploads,
    fallback: Fallback,
    random: fastrand::Rng,
}

impl Table {
    pub(crate) fn new(name: Option<String>, limits: Limits) -> Self {
        let my_name: Option<Arc<str>> = name.map(Into::into);
        // Of a node that is no member nobody speaks.
        let me = node_of(my_name.as_deref().unwrap_or_default());
        let state = State {
            me,
            my_name,
            members: vec![],
            names: BTreeMap::new(),
            health: Health::default(),
            desk: Desk::new(me),
            uploads: Uploads::new(limits),
            fallback: Fallback::default(),
            random: fastrand::Rng::new(),
        };
        Self { epoch: Instant::now(), state: Mutex::new(state) }
    }

    fn now(&self) -> Now {
        self.epoch.elapsed()
    }

    /// These are the members from now on; `own` is what this node is called, if it did not know.
    /// Whether they are others than before.
    pub(crate) fn set_members(&self, names: Vec<String>, own: Option<String>) -> bool {
        let mut state = lock(&self.state);
        if state.my_name.is_none()
            && let Some(own) = own
        {
            state.me = node_of(&own);
            state.my_name = Some(own.into());
            state.desk = Desk::new(state.me);
        }
        let names: BTreeMap<_, Arc<str>> =
            names.into_iter().map(|name| (node_of(&name), name.into())).collect();
        let changed = state.names != names;
        state.members = names.keys().copied().collect();
        state.names = names;
        changed
    }

    pub(crate) fn member_count(&self) -> usize {
        lock(&self.state).members.len()
    }

    pub(crate) fn my_name(&self) -> Option<Arc<str>> {
        lock(&self.state).my_name.clone()
    }

    pub(crate) fn me(&self) -> Node {
        lock(&self.state).me
    }

    pub(crate) fn has_members(&self) -> bool {
        let state = lock(&self.state);
        state.members.iter().any(|node| *node != state.me)
    }

    pub(crate) fn name(&self, node: Node) -> Option<Arc<str>> {
        lock(&self.state).names.get(&node).cloned()
    }

    /// The names of these, as far as they are members.
    pub(crate) fn names(&self, nodes: &[Node]) -> Vec<String> {
        let state = lock(&self.state);
        nodes.iter().filter_map(|node| state.names.get(node)).map(ToString::to_string).collect()
    }

    /// All members but this node.
    pub(crate) fn others(&self) -> Vec<(Node, Arc<str>, Standing)> {
        let now = self.now();
        let state = lock(&self.state);
        let others = state.names.iter().filter(|(node, _)| **node != state.me);
        others
            .map(|(node, name)| (*node, Arc::clone(name), state.health.standing(*node, now)))
            .collect()
    }

    pub(crate) fn quest(&self, group: Group, urgency: Urgency, avoid: Vec<Node>) -> Quest {
        Quest::new(group, urgency, self.now(), avoid)
    }

    /// The next step, and what to tell whom it asks.
    pub(crate) fn step(&self, quest: &mut Quest) -> Step {
        let now = self.now();
        let mut state = lock(&self.state);
        let State { me, members, health, fallback, random, .. } = &mut *state;
        quest.next(View { me: *me, members, health }, fallback, random, now)
    }

    /// The own desk's answer.
    pub(crate) fn look(&self, quest: &mut Quest, inquiry: &Inquiry) {
        let now = self.now();
        let mut state = lock(&self.state);
        let (me, answer) = (state.me, state.desk.locate_own(inquiry));
        quest.answered(me, true, answer, now);
    }

    pub(crate) fn answered(&self, quest: &mut Quest, peer: Node, pull: bool, answer: Answer) {
        let now = self.now();
        lock(&self.state).health.well(peer, now);
        quest.answered(peer, pull, answer, now);
    }

    pub(crate) fn failed(&self, quest: &mut Quest, peer: Node) {
        lock(&self.state).health.failed(peer, self.now());
        quest.failed(peer);
    }

    pub(crate) fn refused(&self, quest: &mut Quest, peer: Node) {
        quest.refused(peer, self.now());
    }

    pub(crate) fn progressed(&self, quest: &mut Quest) {
        quest.progressed(self.now());
    }

    pub(crate) fn lied(&self, peer: Node) {
        lock(&self.state).health.lied(peer, self.now());
    }

    /// Answers somebody; `shares` is whether the blob is here and the asker may have it.
    pub(crate) fn locate(
        &self,
        inquiry: &Inquiry,
        here: Here,
        shares: bool,
        urgency: Urgency,
    ) -> Answer {
        let now = self.now();
        let mut state = lock(&self.state);
        let State { me, members, health, desk, uploads, .. } = &mut *state;
        let homes = View { me: *me, members, health }.homes(inquiry.group, now);
        let role = match homes.contains(me) {
            true if shares => Role::Home,
            true => Role::Registrar,
            false => Role::Stranger,
        };
        let has_room = uploads.has_room(inquiry.asker, urgency);
        desk.locate(inquiry, here, role, has_room)
    }

    /// Whether this node is a home of the group.
    pub(crate) fn is_home(&self, group: Group) -> bool {
        let now = self.now();
        let state = lock(&self.state);
        let State { me, members, health, .. } = &*state;
        View { me: *me, members, health }.homes(group, now).contains(me)
    }

    /// A place among those who are given something, if there is one.
    pub(crate) fn admit(&self, peer: Node, urgency: Urgency) -> bool {
        lock(&self.state).uploads.admit(peer, urgency)
    }

    pub(crate) fn done(&self, peer: Node) {
        lock(&self.state).uploads.done(peer);
    }

    /// A request to the registry that the fallback let pass is over.
    pub(crate) fn fallback_ended(&self, well: bool) {
        let now = self.now();
        lock(&self.state).fallback.ended(well, now);
    }
}
