//! What a member answers to those who ask it for a group, and whom it remembers for that.
//!
//! Whoever was told where to get a group will have it soon, and gives on what it has while the
//! rest comes. A home knows that also of blobs that it has nothing to do with itself: the first who
//! asks is sent to the registry, the next to the first.
//! So those who ask form a tree: the first few get it from the home, each of the next
//! from one of those before it. All of it is soft state: it is lost with the process, bounded, and
//! a wrong reference costs a round trip.
//!
//! Invariant: nobody is referred to somebody who asked after it, so nobody waits for itself.

use std::ops::Range;
use std::time::Duration;

use lru::LruCache;

use crate::{GROUP_BYTES, Group, Node};

/// How many get a group from one node while others wait for somebody to get it from. Simulated:
/// with 1 the last one waits long, with 4 the first ones' links are full.
const FAN_OUT: u32 = 2;

/// Peers that somebody is referred to at once: if one is busy, the next is asked.
const CANDIDATES: usize = 3;

/// Holders of a group that are remembered: all nodes of a large cluster may ask for one at the same
/// time. Nobody is sent to those beyond it.
const MAX_HOLDERS: usize = 8192;

/// Holders of all groups together (10 MB). What was asked for longest ago is forgotten first.
const MAX_KNOWN: usize = 1 << 18;

/// When to ask again: about as long as a few chunks take.
const RETRY: Duration = Duration::from_millis(10);

/// Somebody asks for bytes of a group.
#[derive(Debug, Clone)]
pub struct Inquiry {
    /// The group.
    pub group: Group,
    /// The bytes of the blob; they lie in the group.
    pub bytes: Range<u64>,
    /// Who asks.
    pub asker: Node,
    /// Whether the bytes are to be pulled from the registry if need be. Else it is another home
    /// that asks, which pulls them itself if they are not here.
    pub pull: bool,
    /// Who was busy, or did not have it yet.
    pub except: Vec<Node>,
    /// Who did not answer.
    pub gone: Vec<Node>,
}

/// What is here of what is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Here {
    /// All of it.
    Whole,
    /// The rest comes in: somebody gives it.
    Coming,
    /// Not all of it, and nobody gives the rest, though it may be searched for.
    Nothing,
}

/// What a member is to a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// One of its homes; it shares the blob, and pulls it if asked to.
    Home,
    /// One of its homes, which has nothing to do with the blob, or not with that of the asker. It
    /// knows who asked.
    Registrar,
    /// None of its homes.
    Stranger,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Take it here; what is not here yet comes.
    Have,
    /// Take it from one of these.
    Refer(Vec<Node>),
    /// It is being fetched; ask again then.
    Fetching {
        /// After so long.
        retry: Duration,
    },
    /// It is here, but too much is being given; ask again then.
    Busy {
        /// After so long.
        retry: Duration,
    },
    /// Not here, and it won't be fetched here.
    NotHome,
    /// The blob is not here, or not for who asks, and nobody else is known to get this group: who
    /// asks gets it from the registry, and others will be sent there.
    Absent,
}

/// Who will have a group.
#[derive(Debug)]
struct Holder {
    node: Node,
    bytes: Range<u64>,
    children: u32,
}

/// In the order in which they asked; this node is one of them, once it has it or gets it.
#[derive(Debug, Default)]
struct Entry {
    holders: Vec<Holder>,
}

/// See the module.
#[derive(Debug)]
pub struct Desk {
    me: Node,
    groups: LruCache<Group, Entry>,
    /// Holders of all groups.
    known: usize,
}

impl Desk {
    /// The desk of a node that has answered nobody yet.
    pub fn new(me: Node) -> Self {
        Self { me, groups: LruCache::unbounded(), known: 0 }
    }

    /// Answers somebody. `has_room` is whether one more may be given something now.
    pub fn locate(&mut self, inquiry: &Inquiry, here: Here, role: Role, has_room: bool) -> Answer {
        if role == Role::Stranger && here == Here::Nothing {
            return Answer::NotHome;
        }
        let me = self.me;
        let entry = self.groups.get_or_insert_mut(inquiry.group, Entry::default);
        let before = entry.holders.len();
        let answer = match inquiry.pull {
            true => entry.answer(me, inquiry, here, role, has_room),
            false => entry.answer_home(me, inquiry, here, has_room),
        };
        if matches!(answer, Answer::Have | Answer::Refer(_) | Answer::Absent) {
            entry.will_hold(inquiry.asker, &inquiry.bytes);
        }
        let more = entry.holders.len() - before;
        self.learned(more);
        answer
    }

    /// So many holders more are known.
    fn learned(&mut self, holders: usize) {
        self.known += holders;
        while self.known > MAX_KNOWN && self.groups.len() > 1 {
            let Some((_, forgotten)) = self.groups.pop_lru() else { return };
            self.known -= forgotten.holders.len();
        }
    }

    /// Answers the node itself, which is a home of the group: who has the bytes, or will have them,
    /// without waiting for this node.
    pub fn locate_own(&mut self, inquiry: &Inquiry) -> Answer {
        let inquiry = &Inquiry { asker: self.me, ..inquiry.clone() };
        let entry = self.groups.get_or_insert_mut(inquiry.group, Entry::default);
        let before = entry.holders.len();
        let candidates = entry.candidates(inquiry, None);
        let awaits = entry.awaits_somebody(inquiry);
        entry.will_hold(self.me, &inquiry.bytes);
        let more = entry.holders.len() - before;
        self.learned(more);
        match candidates {
            candidates if !candidates.is_empty() => Answer::Refer(candidates),
            _ if awaits => Answer::Fetching { retry: RETRY },
            _ => Answer::NotHome,
        }
    }
}

impl Entry {
    fn answer(
        &mut self,
        me: Node,
        inquiry: &Inquiry,
        here: Here,
        role: Role,
        has_room: bool,
    ) -> Answer {
        let is_known =
            |holders: &Vec<Holder>, node| holders.iter().any(|holder: &Holder| holder.node == node);
        // What others get is not pulled a second time; and who asked before this node must not
        // wait for it.
        let pulls = role == Role::Home
            && !self.awaits_somebody(inquiry)
            && !is_known(&self.holders, inquiry.asker);
        if has_room && (here == Here::Whole || pulls) && !is_known(&self.holders, me) {
            self.will_hold(me, &whole(inquiry.group));
        }
        let candidates = self.candidates(inquiry, (!has_room).then_some(me));
        match candidates.first() {
            Some(first) if *first == me => return Answer::Have,
            Some(_) => {
                return Answer::Refer(candidates.into_iter().filter(|node| *node != me).collect());
            }
            None => {}
        }
        match here {
            Here::Whole if has_room => Answer::Have,
            Here::Whole => Answer::Busy { retry: RETRY },
            Here::Coming | Here::Nothing if self.awaits_somebody(inquiry) => {
                Answer::Fetching { retry: RETRY }
            }
            Here::Coming | Here::Nothing => Answer::Absent,
        }
    }

    /// What is coming here may be coming from the home that asks.
    fn answer_home(&mut self, me: Node, inquiry: &Inquiry, here: Here, has_room: bool) -> Answer {
        match self.candidates(inquiry, Some(me)) {
            _ if here == Here::Whole && has_room => Answer::Have,
            candidates if !candidates.is_empty() => Answer::Refer(candidates),
            _ => Answer::NotHome,
        }
    }

    /// Those who asked before the asker for the first of these bytes at least, and answer. What they
    /// have not got of the rest is asked for again.
    fn earlier(&mut self, inquiry: &Inquiry) -> impl Iterator<Item = &mut Holder> {
        let start = inquiry.bytes.start;
        let before = self.holders.iter().take_while(|holder| holder.node != inquiry.asker).count();
        self.holders
            .iter_mut()
            .take(before)
            .filter(|holder| !inquiry.gone.contains(&holder.node))
            .filter(move |holder| holder.bytes.contains(&start))
    }

    /// Whether somebody is to get what is asked for.
    fn awaits_somebody(&mut self, inquiry: &Inquiry) -> bool {
        self.earlier(inquiry).next().is_some()
    }

    /// Whom to refer to: the first who has a child too few, else who has the fewest.
    fn candidates(&mut self, inquiry: &Inquiry, without: Option<Node>) -> Vec<Node> {
        let except = |node| inquiry.except.contains(&node) || without == Some(node);
        let excess = |holder: &Holder| holder.children.saturating_sub(FAN_OUT - 1);
        let mut best: Vec<&mut Holder> = Vec::with_capacity(CANDIDATES + 1);
        for holder in self.earlier(inquiry).filter(|holder| !except(holder.node)) {
            // Of equals the one that asked first.
            let at = best.partition_point(|other| excess(other) <= excess(holder));
            if at < CANDIDATES {
                best.truncate(CANDIDATES - 1);
                best.insert(at, holder);
            }
        }
        if let Some(first) = best.first_mut() {
            first.children = first.children.saturating_add(1);
        }
        best.into_iter().map(|holder| holder.node).collect()
    }

    /// A node will have these bytes, beside what it has.
    fn will_hold(&mut self, node: Node, bytes: &Range<u64>) {
        if let Some(known) = self.holders.iter_mut().find(|holder| holder.node == node) {
            let touches = known.bytes.start <= bytes.end && bytes.start <= known.bytes.end;
            known.bytes = match touches {
                true => known.bytes.start.min(bytes.start)..known.bytes.end.max(bytes.end),
                false => bytes.clone(),
            };
            return;
        }
        if self.holders.len() == MAX_HOLDERS {
            return;
        }
        self.holders.push(Holder { node, bytes: bytes.clone(), children: 0 });
    }
}

fn whole(group: Group) -> Range<u64> {
    group.number.saturating_mul(GROUP_BYTES)..group.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inquiry(asker: u64) -> Inquiry {
        let group = Group { blob: 1, number: 0 };
        let (asker, except, gone) = (Node(asker), vec![], vec![]);
        Inquiry { group, bytes: 0..GROUP_BYTES, asker, pull: true, except, gone }
    }

    fn first(answer: Answer) -> Option<u64> {
        match answer {
            Answer::Refer(nodes) => nodes.first().map(|node| node.0),
            _ => None,
        }
    }

    const HOME: Role = Role::Home;
    const ME: Node = Node(1000);

    #[test]
    fn those_who_ask_form_a_tree() {
        let mut desk = Desk::new(ME);
        let mut parent = |asker| desk.locate(&inquiry(asker), Here::Coming, HOME, true);
        assert_eq!([parent(1), parent(2)], [Answer::Have, Answer::Have]);
        let parents: Vec<_> = (3..11).map(|asker| first(parent(asker)).unwrap()).collect();
        assert_eq!(parents, [1, 1, 2, 2, 3, 3, 4, 4]);
    }

    #[test]
    fn nobody_waits_for_who_asked_later() {
        let mut desk = Desk::new(ME);
        for asker in 1..=20 {
            desk.locate(&inquiry(asker), Here::Whole, HOME, true);
        }
        for asker in 1..=20 {
            let answer = desk.locate(&inquiry(asker), Here::Whole, HOME, false);
            if let Answer::Refer(nodes) = answer {
                assert!(nodes.iter().all(|node| node.0 < asker), "{asker}: {nodes:?}");
            }
        }
    }

    #[test]
    fn a_home_that_has_nothing_to_do_with_it_sends_one_to_the_registry_and_the_rest_to_that() {
        let mut desk = Desk::new(ME);
        let mut ask = |asker| desk.locate(&inquiry(asker), Here::Nothing, Role::Registrar, true);
        assert_eq!(ask(1), Answer::Absent);
        assert_eq!(ask(1), Answer::Absent, "it has lost it");
        assert_eq!([2, 3, 4].map(|asker| first(ask(asker)).unwrap()), [1, 1, 2]);
        assert_eq!(first(desk.locate_own(&inquiry(9))), Some(2), "nobody waits for this node");
        for asker in 1..=4 {
            let answer = desk.locate(&inquiry(asker), Here::Coming, HOME, true);
            assert_ne!(answer, Answer::Have, "this node may wait for it");
        }
        let late = desk.locate(&inquiry(5), Here::Coming, HOME, true);
        assert!(matches!(late, Answer::Refer(_)));
    }

    #[test]
    fn a_home_pulls_for_others_and_whoever_is_none_says_so() {
        let mut desk = Desk::new(ME);
        let probe = Inquiry { pull: false, ..inquiry(1) };
        assert_eq!(desk.locate(&probe, Here::Nothing, HOME, true), Answer::NotHome);
        assert_eq!(desk.locate(&probe, Here::Coming, HOME, true), Answer::NotHome, "from whom?");
        assert_eq!(desk.locate(&probe, Here::Whole, HOME, true), Answer::Have);
        let mut desk = Desk::new(ME);
        let stranger = desk.locate(&inquiry(1), Here::Nothing, Role::Stranger, true);
        assert_eq!(stranger, Answer::NotHome);
        assert_eq!(desk.locate(&inquiry(1), Here::Nothing, HOME, true), Answer::Have);
        assert_eq!(first(desk.locate(&inquiry(2), Here::Coming, HOME, false)), Some(1));
        let except = Inquiry { except: vec![Node(1), Node(2)], ..inquiry(3) };
        let [coming, whole, nothing] = [Here::Coming, Here::Whole, Here::Nothing]
            .map(|here| desk.locate(&except, here, HOME, false));
        assert!(matches!((coming, whole), (Answer::Fetching { .. }, Answer::Busy { .. })));
        assert!(matches!(nothing, Answer::Fetching { .. }), "somebody will have it");
        let gone = Inquiry { gone: except.except.clone(), ..except };
        let nothing = desk.locate(&gone, Here::Nothing, HOME, false);
        assert!(matches!(nothing, Answer::Fetching { .. }), "this node will");
        let mut desk = Desk::new(ME);
        let nothing = desk.locate(&gone, Here::Nothing, HOME, false);
        assert_eq!(nothing, Answer::Absent, "nobody will, and it can't be pulled here now");
    }

    #[test]
    fn only_those_are_named_who_have_the_first_of_the_bytes_and_are_not_excepted() {
        let mut desk = Desk::new(ME);
        let mut ask =
            |inquiry: &Inquiry| desk.locate(inquiry, Here::Nothing, Role::Registrar, true);
        let rest = |asker| Inquiry { bytes: GROUP_BYTES / 4..GROUP_BYTES, ..inquiry(asker) };
        ask(&Inquiry { bytes: 0..GROUP_BYTES / 4, ..inquiry(1) });
        assert_eq!(ask(&rest(2)), Answer::Absent, "nobody has the first of these");
        assert_eq!(first(ask(&inquiry(3))), Some(1));
        assert_eq!(first(ask(&rest(4))), Some(2));
        let except = Inquiry { except: vec![Node(2), Node(3)], ..rest(5) };
        assert_eq!(first(ask(&except)), Some(4));
        assert_eq!(ask(&rest(1)), Answer::Absent, "who asked later may wait for it");
        assert_eq!(first(ask(&Inquiry { except: (2..6).map(Node).collect(), ..rest(6) })), Some(1));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut desk = Desk::new(ME);
        for asker in 0..10_000 {
            let entry = desk.groups.get_or_insert_mut(inquiry(0).group, Entry::default);
            entry.holders.push(Holder { node: Node(asker), bytes: 0..1, children: 0 });
            entry.holders.truncate(MAX_HOLDERS);
        }
        desk.known = MAX_HOLDERS;
        desk.locate(&inquiry(20_000), Here::Whole, HOME, true);
        assert_eq!(desk.known, MAX_HOLDERS);
        for number in 1..MAX_KNOWN as u64 {
            let group = Group { blob: 1, number };
            desk.locate(&Inquiry { group, ..inquiry(1) }, Here::Whole, HOME, true);
        }
        let known: usize = desk.groups.iter().map(|(_, entry)| entry.holders.len()).sum();
        assert!(known == desk.known && known <= MAX_KNOWN, "{known}");
    }
}
