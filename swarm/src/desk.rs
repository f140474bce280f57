//! What a member answers to those who ask it for a group, and whom it remembers for that.
//!
//! Whoever was told where to get a group will have it soon, and gives on what it has while the
//! rest comes. A home knows that also of blobs that it has nothing to do with itself: the first who
//! asks is sent to the registry, the next to the first.
//! So those who ask form a tree: the first few get it from the home, each of the next
//! from one of those before it. All of it is soft state: it is lost with the process, bounded, and
//! a wrong reference costs a round trip.
//!
//! Who asked when is known of each *part* of a group: a node may ask for the parts one by one, and
//! another for all of them.
//!
//! Invariant: nobody is referred to somebody who asked for that part after it, so nobody waits for
//! itself.

use std::ops::Range;
use std::time::Duration;

use lru::LruCache;

use crate::{Group, Node};

/// Bytes of a part: what is fetched and published as one, a chunk of the store.
const PART_BYTES: u64 = 1 << 20;

/// How many get a part from one node while others wait for somebody to get it from. Simulated:
/// with 1 the last one waits long, with 4 the first ones' links are full.
const FAN_OUT: u32 = 2;

/// Peers that somebody is referred to at once: if one is busy, the next is asked.
const CANDIDATES: usize = 3;

/// Holders of a part that are remembered: all nodes of a large cluster may ask for one at the same
/// time. Nobody is sent to those beyond it.
const MAX_HOLDERS: usize = 8192;

/// Parts and their holders, all together (some 16 MiB). What was asked for longest ago is forgotten
/// first.
const MAX_KNOWN: usize = 1 << 19;

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
    /// The rest comes in, or is searched for.
    Coming,
    /// Not all of it, and the rest does not come.
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

/// A chunk's place in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Part {
    /// As in [`Group`].
    blob: u64,
    /// Its first byte, in [`PART_BYTES`].
    number: u64,
}

/// Who will have a part.
#[derive(Debug)]
struct Holder {
    node: Node,
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
    parts: LruCache<Part, Entry>,
    /// Holders of all parts.
    known: usize,
}

impl Desk {
    /// The desk of a node that has answered nobody yet.
    pub fn new(me: Node) -> Self {
        Self { me, parts: LruCache::unbounded(), known: 0 }
    }

    /// Answers somebody. `has_room` is whether one more may be given something now.
    pub fn locate(&mut self, inquiry: &Inquiry, here: Here, role: Role, has_room: bool) -> Answer {
        if role == Role::Stranger && here == Here::Nothing {
            return Answer::NotHome;
        }
        let me = self.me;
        let entry = self.first_part(inquiry);
        let before = entry.holders.len();
        let answer = match inquiry.pull {
            true => entry.answer(me, inquiry, here, role, has_room),
            false => entry.answer_home(me, inquiry, here, has_room),
        };
        let more = entry.holders.len() - before;
        self.learned(more);
        if answer == Answer::Have && inquiry.pull {
            self.will_hold(me, inquiry);
        }
        if matches!(answer, Answer::Have | Answer::Refer(_) | Answer::Absent) {
            self.will_hold(inquiry.asker, inquiry);
        }
        answer
    }

    /// Answers the node itself, which is a home of the group: who has the bytes, or will have them,
    /// without waiting for this node.
    pub fn locate_own(&mut self, inquiry: &Inquiry) -> Answer {
        let inquiry = &Inquiry { asker: self.me, ..inquiry.clone() };
        let entry = self.first_part(inquiry);
        let candidates = entry.candidates(inquiry, None);
        let awaits = entry.awaits_somebody(inquiry);
        self.will_hold(self.me, inquiry);
        match candidates {
            candidates if !candidates.is_empty() => Answer::Refer(candidates),
            _ if awaits => Answer::Fetching { retry: RETRY },
            _ => Answer::NotHome,
        }
    }

    /// What decides: what follows it is asked for again, from whom has not got it.
    fn first_part(&mut self, inquiry: &Inquiry) -> &mut Entry {
        let part = Part { blob: inquiry.group.blob, number: inquiry.bytes.start / PART_BYTES };
        self.parts.get_or_insert_mut(part, Entry::default)
    }

    /// A node will have these bytes. It has its place behind those who asked before it.
    fn will_hold(&mut self, node: Node, Inquiry { group, bytes, .. }: &Inquiry) {
        let end = bytes.end.min(group.end()).div_ceil(PART_BYTES);
        for number in bytes.start / PART_BYTES..end {
            let part = Part { blob: group.blob, number };
            let entry = self.parts.get_or_insert_mut(part, Entry::default);
            let before = entry.holders.len();
            entry.add(node);
            let more = entry.holders.len() - before;
            self.learned(more);
        }
    }

    /// So many holders more are known.
    fn learned(&mut self, holders: usize) {
        self.known += holders;
        while self.known + self.parts.len() > MAX_KNOWN && self.parts.len() > 1 {
            let Some((_, forgotten)) = self.parts.pop_lru() else { return };
            self.known -= forgotten.holders.len();
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
        // What others get is not pulled a second time; and who asked before this node must not
        // wait for it.
        let pulls =
            role == Role::Home && !self.awaits_somebody(inquiry) && !self.knows(inquiry.asker);
        if has_room && (here == Here::Whole || pulls) {
            self.add(me);
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

    /// Those who asked before the asker, and answer.
    fn earlier(&mut self, inquiry: &Inquiry) -> impl Iterator<Item = &mut Holder> {
        let before = self.holders.iter().take_while(|holder| holder.node != inquiry.asker).count();
        let earlier = self.holders.iter_mut().take(before);
        earlier.filter(|holder| !inquiry.gone.contains(&holder.node))
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

    fn knows(&self, node: Node) -> bool {
        self.holders.iter().any(|holder| holder.node == node)
    }

    /// A node will have it.
    fn add(&mut self, node: Node) {
        if !self.knows(node) && self.holders.len() < MAX_HOLDERS {
            self.holders.push(Holder { node, children: 0 });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GROUP_BYTES;

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
        let rest = |asker| Inquiry { bytes: PART_BYTES..GROUP_BYTES, ..inquiry(asker) };
        ask(&Inquiry { bytes: 0..PART_BYTES, ..inquiry(1) });
        assert_eq!(ask(&rest(2)), Answer::Absent, "nobody has the first of these");
        assert_eq!(first(ask(&inquiry(3))), Some(1));
        assert_eq!(first(ask(&rest(4))), Some(2));
        let except = Inquiry { except: vec![Node(2), Node(3)], ..rest(5) };
        assert_eq!(first(ask(&except)), Some(4));
        assert_eq!(ask(&inquiry(1)), Answer::Absent, "who asked later may wait for it");
        assert!(first(ask(&rest(1))).is_some(), "for this part it was the last to ask");
    }

    #[test]
    fn a_home_waits_for_whom_it_has_sent_to_the_registry_whatever_it_got_itself_before() {
        let mut desk = Desk::new(ME);
        let own = |bytes| Inquiry { bytes, ..inquiry(ME.0) };
        let (first_half, second_half) = (0..GROUP_BYTES / 2, GROUP_BYTES / 2..GROUP_BYTES);
        assert_eq!(desk.locate_own(&own(first_half)), Answer::NotHome);
        let other = Inquiry { bytes: second_half.clone(), ..inquiry(1) };
        let answer = desk.locate(&other, Here::Nothing, Role::Registrar, true);
        assert_eq!(answer, Answer::Absent);
        assert_eq!(first(desk.locate_own(&own(second_half))), Some(1));
    }

    #[test]
    fn a_home_pulls_no_more_than_it_is_asked_for() {
        let mut desk = Desk::new(ME);
        let one = Inquiry { bytes: 0..PART_BYTES, ..inquiry(1) };
        assert_eq!(desk.locate(&one, Here::Nothing, HOME, true), Answer::Have);
        let next = Inquiry { bytes: PART_BYTES..2 * PART_BYTES, ..inquiry(1) };
        assert_eq!(desk.locate(&next, Here::Nothing, HOME, true), Answer::Have, "it pulls it, too");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut desk = Desk::new(ME);
        let one = |asker| Inquiry { bytes: 0..PART_BYTES, ..inquiry(asker) };
        for asker in 0..MAX_HOLDERS as u64 + 10 {
            desk.locate(&one(asker), Here::Whole, HOME, true);
        }
        assert_eq!(desk.known, MAX_HOLDERS);
        for number in 1..MAX_KNOWN as u64 {
            let group = Group { blob: 1, number };
            let bytes = number * GROUP_BYTES..number * GROUP_BYTES + PART_BYTES;
            desk.locate(&Inquiry { group, bytes, ..inquiry(1) }, Here::Whole, HOME, true);
        }
        // Of these nobody is remembered.
        for number in MAX_KNOWN as u64..2 * MAX_KNOWN as u64 {
            let group = Group { blob: 1, number };
            let bytes = number * GROUP_BYTES..number * GROUP_BYTES + PART_BYTES;
            let probe = Inquiry { group, bytes, pull: false, ..inquiry(1) };
            assert_eq!(desk.locate(&probe, Here::Nothing, HOME, true), Answer::NotHome);
        }
        let known: usize = desk.parts.iter().map(|(_, entry)| entry.holders.len()).sum();
        let parts = desk.parts.len();
        assert!(known == desk.known && known + parts <= MAX_KNOWN, "{known}, {parts}");
    }
}
