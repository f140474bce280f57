//! The search of one node for bytes of one group: whom to ask, whom to take them from, when to
//! wait, and when to go to the registry after all.
//!
//! The caller does what [`Quest::next`] says, tells what came of it, and asks for the next step,
//! until it has its bytes or gives up.
//!
//! Invariant: each quest comes to the registry in the end: it asks each home once, and waits no
//! longer than its urgency allows.

use std::collections::VecDeque;
use std::time::Duration;

use crate::{Answer, Fallback, Group, Health, Node, Now, Urgency, homes};

/// How long peers are waited for that are busy, before the registry is asked. A reader's patience
/// is short; what nobody waits for has time. Who is gone is not waited for, so this is about peers
/// that do get the bytes: on links of 100 Mbit/s that share 16 groups it takes seconds.
const fn patience(urgency: Urgency) -> Duration {
    match urgency {
        Urgency::Demand => Duration::from_secs(5),
        Urgency::Ahead => Duration::from_secs(10),
        Urgency::Background => Duration::from_secs(30),
    }
}

/// How long to wait for who was busy, or for leave to ask the registry.
const PAUSE: Duration = Duration::from_millis(10);

/// Pauses differ by up to so much, so that those who were refused together don't come back
/// together.
const JITTER: f64 = 0.5;

/// What a node knows of the others.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The node itself.
    pub me: Node,
    /// All members, itself included.
    pub members: &'a [Node],
    /// Who answers.
    pub health: &'a Health,
}

impl View<'_> {
    /// The homes of a group as things are now: those who can't be asked are passed over.
    pub fn homes(&self, group: Group, now: Now) -> Vec<Node> {
        let usable = |node: &Node| *node == self.me || self.health.is_usable(*node, now);
        homes(group, self.members.iter().copied().filter(usable))
    }
}

/// Why the registry is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// It is this node's turn: it is a home of the group, or a home has told it so.
    Turn,
    /// Peers don't answer, or are busy. The fallback counts it: it must be told the end.
    Fallback,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Ask a peer, which is to pull the bytes from the registry if `pull`; then tell
    /// [`Quest::answered`].
    Ask {
        /// Whom.
        peer: Node,
        /// Whether it is to pull.
        pull: bool,
    },
    /// Ask the own desk ([`Desk::locate_own`](crate::Desk::locate_own)); then tell
    /// [`Quest::answered`].
    Look,
    /// Take the bytes from a peer; then tell [`Quest::failed`] or [`Quest::progressed`].
    Fetch {
        /// From whom.
        peer: Node,
    },
    /// Wait.
    Wait(Duration),
    /// Take the bytes from the registry.
    Registry(Way),
}

/// See the module.
#[derive(Debug)]
pub struct Quest {
    group: Group,
    urgency: Urgency,
    began: Now,
    /// Whom to take the bytes from.
    candidates: VecDeque<Node>,
    /// Who was tried in vain since the last pause.
    except: Vec<Node>,
    /// Who did not answer.
    gone: Vec<Node>,
    /// Homes that have nothing, or that were waited for too long.
    exhausted: Vec<Node>,
    /// Whether another home was asked although this node is one itself.
    probed: bool,
    /// Whether a home has said that nobody has it.
    turn: bool,
    pause: Option<Duration>,
}

impl Quest {
    /// A search that begins now. `avoid` are those from whom the bytes are expected already, in
    /// vain so far.
    pub fn new(group: Group, urgency: Urgency, now: Now, avoid: Vec<Node>) -> Self {
        Self {
            group,
            urgency,
            began: now,
            candidates: VecDeque::new(),
            exhausted: avoid.clone(),
            except: avoid,
            gone: Vec::new(),
            probed: false,
            turn: false,
            pause: None,
        }
    }

    /// Who was tried in vain: to be told to who is asked.
    pub fn except(&self) -> &[Node] {
        &self.except
    }

    /// Who did not answer: to be told, too.
    pub fn gone(&self) -> &[Node] {
        &self.gone
    }

    /// The next step.
    pub fn next(
        &mut self,
        view: View<'_>,
        fallback: &mut Fallback,
        random: &mut fastrand::Rng,
        now: Now,
    ) -> Step {
        while let Some(peer) = self.candidates.pop_front() {
            let is_member = || view.members.contains(&peer);
            if peer != view.me && is_member() && view.health.is_usable(peer, now) {
                return Step::Fetch { peer };
            }
            // Or it would be named again and again.
            self.gone.push(peer);
        }
        if let Some(pause) = self.pause.take() {
            // Who was busy may not be any more.
            self.except.clear();
            return Step::Wait(jittered(pause, random));
        }
        if self.turn {
            return Step::Registry(Way::Turn);
        }
        let homes = view.homes(self.group, now);
        let own_place = homes.iter().position(|home| *home == view.me);
        for (place, home) in homes.into_iter().enumerate() {
            if self.exhausted.contains(&home) {
                continue;
            }
            if home == view.me {
                return Step::Look;
            }
            let pull = own_place.is_none_or(|own| place < own);
            if pull || !self.probed {
                return Step::Ask { peer: home, pull };
            }
        }
        // Who is only a home because others can't be asked is one of many who think so.
        if homes_of_all(self.group, view).contains(&view.me) {
            return Step::Registry(Way::Turn);
        }
        if fallback.try_start(self.urgency, now) {
            return Step::Registry(Way::Fallback);
        }
        self.exhausted.clear();
        self.except.clear();
        Step::Wait(jittered(PAUSE, random))
    }

    /// A peer has answered.
    pub fn answered(&mut self, peer: Node, pull: bool, answer: Answer, now: Now) {
        self.probed |= !pull;
        match answer {
            Answer::Have => self.candidates.push_back(peer),
            Answer::Refer(nodes) => {
                let nodes = nodes.into_iter().filter(|node| !self.except.contains(node));
                self.candidates.extend(nodes);
                if self.candidates.is_empty() {
                    self.wait(peer, PAUSE, now);
                }
            }
            Answer::Fetching { retry } | Answer::Busy { retry } => self.wait(peer, retry, now),
            Answer::Absent => self.turn = true,
            Answer::NotHome => self.exhausted.push(peer),
        }
    }

    /// A peer did not answer, or gave an answer that makes no sense.
    pub fn failed(&mut self, peer: Node) {
        self.exhausted.push(peer);
        self.gone.push(peer);
    }

    /// A peer that was to give bytes has not got them, or gives too much already.
    pub fn refused(&mut self, peer: Node, now: Now) {
        self.except.push(peer);
        if self.candidates.is_empty() {
            self.wait(peer, PAUSE, now);
        }
    }

    /// Bytes came: what comes next is looked for with new patience.
    pub fn progressed(&mut self, now: Now) {
        self.began = now;
        self.turn = false;
        self.exhausted.clear();
    }

    fn wait(&mut self, peer: Node, pause: Duration, now: Now) {
        if now.saturating_sub(self.began) < patience(self.urgency) {
            self.pause = Some(pause.min(patience(self.urgency)));
        } else {
            self.exhausted.push(peer);
        }
    }
}

fn homes_of_all(group: Group, view: View<'_>) -> Vec<Node> {
    homes(group, view.members.iter().copied())
}

fn jittered(pause: Duration, random: &mut fastrand::Rng) -> Duration {
    pause.mul_f64(1.0 - JITTER / 2.0 + JITTER * random.f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a node knows, and its group's homes.
    struct World {
        members: Vec<Node>,
        homes: Vec<Node>,
        health: Health,
        fallback: Fallback,
        random: fastrand::Rng,
        now: Now,
    }

    const GROUP: Group = Group { blob: 1, number: 9 };

    impl World {
        fn new() -> Self {
            let members: Vec<_> = (1..=10).map(Node).collect();
            Self {
                homes: homes(GROUP, members.iter().copied()),
                members,
                health: Health::default(),
                fallback: Fallback::default(),
                random: fastrand::Rng::with_seed(1),
                now: Now::ZERO,
            }
        }

        fn stranger(&self) -> Node {
            *self.members.iter().find(|node| !self.homes.contains(node)).unwrap()
        }

        fn quest(&self) -> Quest {
            Quest::new(GROUP, Urgency::Demand, self.now, vec![])
        }

        fn next(&mut self, quest: &mut Quest, me: Node) -> Step {
            let Self { members, health, fallback, random, now, .. } = self;
            quest.next(View { me, members, health }, fallback, random, *now)
        }
    }

    #[test]
    fn homes_are_asked_in_turn_and_then_the_registry() {
        let mut world = World::new();
        let (me, mut quest) = (world.stranger(), world.quest());
        for home in world.homes.clone() {
            assert_eq!(world.next(&mut quest, me), Step::Ask { peer: home, pull: true });
            quest.answered(home, true, Answer::NotHome, world.now);
        }
        assert_eq!(world.next(&mut quest, me), Step::Registry(Way::Fallback));
    }

    #[test]
    fn a_home_asks_its_deputy_whether_it_has_it_and_pulls() {
        let mut world = World::new();
        let (mut quest, first, second) = (world.quest(), world.homes[0], world.homes[1]);
        assert_eq!(world.next(&mut quest, first), Step::Look, "others may have asked before");
        quest.answered(first, true, Answer::NotHome, world.now);
        assert_eq!(world.next(&mut quest, first), Step::Ask { peer: second, pull: false });
        quest.answered(second, false, Answer::NotHome, world.now);
        assert_eq!(world.next(&mut quest, first), Step::Registry(Way::Turn));
        let mut quest = world.quest();
        assert_eq!(world.next(&mut quest, second), Step::Ask { peer: first, pull: true });
        world.health.failed(first, world.now);
        quest.failed(first);
        assert_eq!(world.next(&mut quest, second), Step::Look);
        quest.answered(second, true, Answer::NotHome, world.now);
        let Step::Ask { pull: false, .. } = world.next(&mut quest, second) else { panic!() };
    }

    #[test]
    fn who_is_told_that_nobody_has_it_takes_it_from_the_registry() {
        let mut world = World::new();
        let (me, home, mut quest) = (world.stranger(), world.homes[0], world.quest());
        quest.answered(home, true, Answer::Absent, world.now);
        assert_eq!(world.next(&mut quest, me), Step::Registry(Way::Turn));
        quest.progressed(world.now);
        assert_eq!(world.next(&mut quest, me), Step::Ask { peer: home, pull: true });
    }

    #[test]
    fn who_is_referred_to_is_tried_and_told_when_it_was_busy() {
        let mut world = World::new();
        let (me, home, mut quest) = (world.stranger(), world.homes[0], world.quest());
        let others: Vec<_> =
            world.members.iter().copied().filter(|node| *node != me && *node != home).collect();
        world.next(&mut quest, me);
        // Itself, and somebody who is no member.
        let named = vec![me, Node(99), others[0], others[1]];
        quest.answered(home, true, Answer::Refer(named), world.now);
        for other in &others[..2] {
            assert_eq!(world.next(&mut quest, me), Step::Fetch { peer: *other });
            quest.refused(*other, world.now);
        }
        assert_eq!(quest.except(), &others[..2]);
        assert!(matches!(world.next(&mut quest, me), Step::Wait(_)));
        assert_eq!(world.next(&mut quest, me), Step::Ask { peer: home, pull: true });
    }

    #[test]
    fn who_is_not_asked_any_more_is_not_named_for_ever() {
        let mut world = World::new();
        let (me, mut desk, liar) = (world.homes[0], crate::Desk::new(world.homes[0]), Node(99));
        world.members.push(liar);
        world.homes = vec![me];
        let inquiry = |quest: &Quest| crate::Inquiry {
            group: GROUP,
            bytes: 0..1,
            asker: me,
            pull: true,
            except: quest.except().to_vec(),
            gone: quest.gone().to_vec(),
        };
        let mut quest = world.quest();
        let asks = crate::Inquiry { asker: liar, ..inquiry(&quest) };
        desk.locate(&asks, crate::Here::Nothing, crate::Role::Registrar, true);
        world.health.lied(liar, world.now);
        for _ in 0..10 {
            match world.next(&mut quest, me) {
                Step::Look => {
                    let answer = desk.locate_own(&inquiry(&quest));
                    quest.answered(me, true, answer, world.now);
                }
                Step::Ask { peer, pull } => quest.answered(peer, pull, Answer::NotHome, world.now),
                step => return assert_eq!(step, Step::Registry(Way::Turn)),
            }
        }
        panic!("it never ends");
    }

    #[test]
    fn who_is_busy_for_too_long_is_given_up() {
        let mut world = World::new();
        let (me, mut quest) = (world.stranger(), world.quest());
        let mut waited = Duration::ZERO;
        loop {
            match world.next(&mut quest, me) {
                Step::Ask { peer, .. } => {
                    let retry = Duration::from_secs(3600);
                    quest.answered(peer, true, Answer::Busy { retry }, world.now);
                }
                Step::Wait(pause) => {
                    waited += pause;
                    world.now += pause;
                }
                step => break assert_eq!(step, Step::Registry(Way::Fallback)),
            }
        }
        let most = patience(Urgency::Demand);
        assert!(waited >= most && waited <= most * 2, "{waited:?}");
    }

    #[test]
    fn without_any_peer_the_registry_is_asked_a_little_at_first() {
        let mut world = World::new();
        let me = world.stranger();
        for node in world.members.clone() {
            world.health.failed(node, world.now);
        }
        let mut quests: Vec<_> = (0..10).map(|_| world.quest()).collect();
        for quest in &mut quests {
            assert_eq!(world.next(quest, me), Step::Look);
            quest.answered(me, true, Answer::NotHome, world.now);
        }
        let steps: Vec<_> = quests.iter_mut().map(|quest| world.next(quest, me)).collect();
        let started = steps.iter().filter(|step| **step == Step::Registry(Way::Fallback)).count();
        assert_eq!(started, 4, "two, and two more for readers who wait");
        assert!(matches!(steps[9], Step::Wait(_)));
        world.fallback.ended(true, world.now);
        quests[9].answered(me, true, Answer::NotHome, world.now);
        assert_eq!(world.next(&mut quests[9], me), Step::Registry(Way::Fallback));
    }

    #[test]
    fn a_second_search_avoids_whom_the_first_one_waits_for() {
        let mut world = World::new();
        let (me, home) = (world.stranger(), world.homes[0]);
        let mut quest = Quest::new(GROUP, Urgency::Demand, world.now, vec![home]);
        let second = world.homes[1];
        assert_eq!(world.next(&mut quest, me), Step::Ask { peer: second, pull: true });
    }
}
