//! How bytes are asked for: `GET /v1/blobs/sha256:<hex>` with one range and a few headers, over
//! HTTP/1.1. Answered by 206 with the bytes from the first one on, as far as they come; the body may
//! end early. 404: not here, or not for the asker; 409: not these bytes; 503: too much is given.
//!
//! Invariant: what comes in is bounded and checked once, in [`Wanted::parse`], [`inquiry`] and
//! [`answer`].

use std::ops::Range;
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderValue, RANGE};
use hyper::{Method, Request};
use weightfs_proto::peer;
use weightfs_store::Digest;
use weightfs_swarm::{Answer, GROUP_BYTES, Group, Inquiry, Urgency};

use crate::Name;
use crate::table::node_of;

/// Where blobs are.
const BLOBS: &str = "/v1/blobs/";

/// The repository that the asker may read the blob from.
const REPOSITORY: &str = "weightfs-repository";
/// The asker's name.
const ASKER: &str = "weightfs-asker";
/// One of demand, ahead, background.
const URGENCY: &str = "weightfs-urgency";
/// Whether the bytes are to be pulled: the answer to a question was to ask for them here.
const PULL: &str = "weightfs-pull";
/// In answers: `checked`, if the bytes were compared with digests here, else `transport`.
pub(crate) const TRUST: &str = "weightfs-trust";

/// Longest names (distribution-spec allows 255 for a repository and its host together).
const MAX_NAME: usize = 512;

/// Members that are named in a question at the most.
const MAX_NAMED: usize = 64;

/// Members that an answer refers to at the most; what it names beyond them is not looked at.
const MAX_REFERRED: usize = 8;

/// Bytes that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) name: Name,
    pub(crate) bytes: Range<u64>,
    pub(crate) asker: String,
    pub(crate) urgency: Urgency,
    pub(crate) pull: bool,
}

impl Wanted {
    /// What a request asks for; `None` if it makes no sense.
    pub(crate) fn parse(method: &Method, path: &str, headers: &HeaderMap) -> Option<Self> {
        if method != Method::GET {
            return None;
        }
        let digest: Digest = path.strip_prefix(BLOBS)?.parse().ok()?;
        let text = |name: &str| headers.get(name)?.to_str().ok();
        let bytes = range(headers.get(RANGE)?.to_str().ok()?)?;
        let group = Group::at(0, bytes.start);
        let urgency = match text(URGENCY)? {
            "demand" => Urgency::Demand,
            "ahead" => Urgency::Ahead,
            "background" => Urgency::Background,
            _ => return None,
        };
        let repository = name(text(REPOSITORY)?)?;
        let asker = name(text(ASKER)?)?;
        let pull = text(PULL).is_some();
        let name = Name { digest, repository };
        (bytes.end <= group.end()).then_some(Self { name, bytes, asker, urgency, pull })
    }

    /// The request that asks a member for it.
    pub(crate) fn request<B>(&self, member: &str, body: B) -> Option<Request<B>> {
        let Self { name, bytes, asker, urgency, pull } = self;
        let urgency = match urgency {
            Urgency::Demand => "demand",
            Urgency::Ahead => "ahead",
            Urgency::Background => "background",
        };
        let mut request = Request::get(format!("http://{member}{BLOBS}{}", name.digest))
            .header(RANGE, format!("bytes={}-{}", bytes.start, bytes.end.checked_sub(1)?))
            .header(REPOSITORY, HeaderValue::from_str(&name.repository).ok()?)
            .header(ASKER, HeaderValue::from_str(asker).ok()?)
            .header(URGENCY, urgency);
        if *pull {
            request = request.header(PULL, "yes");
        }
        request.body(body).ok()
    }
}

/// One range of bytes (RFC 9110, section 14.1.2), which is not empty.
fn range(text: &str) -> Option<Range<u64>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if digits { text.parse::<u64>().ok() } else { None }
    };
    let (first, end) = (number(first)?, number(last)?.checked_add(1)?);
    (first < end).then_some(first..end)
}

/// A name that is short and printable.
fn name(text: &str) -> Option<String> {
    let good = (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    good.then(|| text.to_owned())
}

/// What a question asks for; `None` if it makes no sense.
pub(crate) fn inquiry(request: &peer::LocateRequest) -> Option<(Name, Inquiry, Urgency)> {
    let peer::LocateRequest { blob, start, end, asker, pull, except, gone, .. } = request;
    let blob = blob.as_ref()?;
    let name = Name { digest: blob.digest.parse().ok()?, repository: name(&blob.repository)? };
    let group = Group::at(name.key(), *start);
    if start >= end || *end > group.end() || except.len().max(gone.len()) > MAX_NAMED {
        return None;
    }
    let urgency = match request.urgency() {
        peer::Urgency::Demand => Urgency::Demand,
        peer::Urgency::Ahead => Urgency::Ahead,
        peer::Urgency::Background => Urgency::Background,
    };
    let nodes = |names: &[String]| names.iter().map(|name| node_of(name)).collect();
    let inquiry = Inquiry {
        group,
        bytes: *start..*end,
        asker: node_of(&self::name(asker)?),
        pull: *pull,
        except: nodes(except),
        gone: nodes(gone),
    };
    Some((name, inquiry, urgency))
}

/// A question about bytes, of which the members that are named are as many as may be.
pub(crate) fn question(
    name: &Name,
    inquiry: &Inquiry,
    asker: &str,
    urgency: Urgency,
    [mut except, mut gone]: [Vec<String>; 2],
) -> peer::LocateRequest {
    let urgency = match urgency {
        Urgency::Demand => peer::Urgency::Demand,
        Urgency::Ahead => peer::Urgency::Ahead,
        Urgency::Background => peer::Urgency::Background,
    };
    except.truncate(MAX_NAMED);
    gone.truncate(MAX_NAMED);
    let (digest, repository) = (name.digest.to_string(), name.repository.clone());
    peer::LocateRequest {
        blob: Some(peer::Blob { digest, repository }),
        start: inquiry.bytes.start,
        end: inquiry.bytes.end,
        asker: asker.to_owned(),
        urgency: urgency.into(),
        pull: inquiry.pull,
        except,
        gone,
    }
}

/// What a peer's answer means; `None` if it means nothing.
pub(crate) fn answer(reply: peer::LocateReply) -> Option<Answer> {
    use peer::locate_reply::Answer as Wire;
    let retry = |later: peer::Later| Duration::from_millis(later.retry_milliseconds.into());
    Some(match reply.answer? {
        Wire::Have(_) => Answer::Have,
        Wire::Refer(refer) => Answer::Refer(
            refer.members.iter().take(MAX_REFERRED).map(|name| node_of(name)).collect(),
        ),
        Wire::Fetching(later) => Answer::Fetching { retry: retry(later) },
        Wire::Busy(later) => Answer::Busy { retry: retry(later) },
        Wire::NotHome(_) => Answer::NotHome,
        Wire::Absent(_) => Answer::Absent,
    })
}

/// The parts of a range that lie in one group each.
pub(crate) fn by_group(bytes: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (mut at, end) = (bytes.start, bytes.end);
    std::iter::from_fn(move || {
        let part = at..end.min((at / GROUP_BYTES + 1).saturating_mul(GROUP_BYTES));
        at = part.end;
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        let name = Name { digest: Digest::of(b"x"), repository: "registry:5000/a/b".into() };
        let (asker, urgency) = ("10.0.0.7:7700".into(), Urgency::Ahead);
        Wanted { name, bytes: 5 << 20..6 << 20, asker, urgency, pull: true }
    }

    #[test]
    fn what_is_asked_for_is_what_is_understood() {
        let request = wanted().request("10.0.0.1:7700", ()).unwrap();
        let path = request.uri().path().to_owned();
        let parsed = Wanted::parse(request.method(), &path, request.headers());
        assert_eq!(parsed, Some(wanted()));
        let question = Inquiry {
            group: Group::at(wanted().name.key(), 5 << 20),
            bytes: wanted().bytes,
            asker: node_of("10.0.0.7:7700"),
            pull: false,
            except: vec![node_of("a:1")],
            gone: vec![],
        };
        let names = [vec!["a:1".to_owned()], vec![]];
        let sent =
            super::question(&wanted().name, &question, "10.0.0.7:7700", Urgency::Demand, names);
        let (name, understood, urgency) = inquiry(&sent).unwrap();
        assert_eq!((name, urgency), (wanted().name, Urgency::Demand));
        assert_eq!(format!("{understood:?}"), format!("{question:?}"));
    }

    #[test]
    fn parts_of_a_range_lie_in_one_group() {
        let parts: Vec<_> = by_group(&(GROUP_BYTES - 1..2 * GROUP_BYTES + 1)).collect();
        let group = GROUP_BYTES;
        assert_eq!(parts, [group - 1..group, group..2 * group, 2 * group..2 * group + 1]);
        assert_eq!(by_group(&(7..7)).count(), 0);
    }

    #[test]
    fn fuzz_requests_are_refused_or_sound() {
        let samples: [&[u8]; 2] = [
            b"/v1/blobs/sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881\n\
              bytes=0-1048575\nregistry:5000/a/b\n10.0.0.7:7700\ndemand\nyes",
            b"/v1/blobs/\nbytes=5-4\nr/m\nme\nahead\n",
        ];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = weightfs_fuzz::foreign(&samples, input);
            let mut lines = bytes.split(|byte| *byte == b'\n');
            let path = String::from_utf8_lossy(lines.next().unwrap_or_default()).into_owned();
            let names = ["range", REPOSITORY, ASKER, URGENCY, PULL]
                .map(hyper::header::HeaderName::from_static);
            let values = lines.map(HeaderValue::from_bytes);
            let headers = names.into_iter().zip(values);
            let headers: HeaderMap =
                headers.filter_map(|(name, value)| Some((name, value.ok()?))).collect();
            if let Some(wanted) = Wanted::parse(&Method::GET, &path, &headers) {
                assert!(wanted.bytes.end - wanted.bytes.start <= GROUP_BYTES);
                assert!(wanted.asker.len().max(wanted.name.repository.len()) <= MAX_NAME);
                let again = wanted.request("a:1", ()).unwrap();
                let path = again.uri().path().to_owned();
                assert_eq!(Wanted::parse(&Method::GET, &path, again.headers()), Some(wanted));
            }
        });
    }

    #[test]
    fn fuzz_questions_are_refused_or_sound() {
        use tonic::codegen::Bytes;
        let question = wanted();
        let inquiry_of = Inquiry {
            group: Group::at(0, 0),
            bytes: question.bytes.clone(),
            asker: node_of("me"),
            pull: true,
            except: vec![],
            gone: vec![],
        };
        let names = [vec!["a:1".into()], vec!["b:2".into()]];
        let sample = super::question(&question.name, &inquiry_of, "me", Urgency::Demand, names);
        let sample = prost::Message::encode_to_vec(&sample);
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = Bytes::from(weightfs_fuzz::foreign(&[&sample], input));
            let Ok(request) = <peer::LocateRequest as prost::Message>::decode(bytes) else {
                return;
            };
            if let Some((_, inquiry, _)) = inquiry(&request) {
                assert!(inquiry.bytes.start < inquiry.bytes.end);
                assert!(inquiry.bytes.end <= inquiry.group.end());
                assert!(inquiry.except.len().max(inquiry.gone.len()) <= MAX_NAMED);
            }
        });
    }

    #[test]
    fn fuzz_answers_mean_nothing_or_refer_to_few() {
        use peer::locate_reply::Answer as Wire;
        use tonic::codegen::Bytes;
        let sample =
            |answer| prost::Message::encode_to_vec(&peer::LocateReply { answer: Some(answer) });
        let members = (0..20).map(|number| format!("10.0.0.{number}:7700")).collect();
        let samples = [
            sample(Wire::Refer(peer::Refer { members })),
            sample(Wire::Busy(peer::Later { retry_milliseconds: u32::MAX })),
        ];
        let samples = [samples[0].as_slice(), samples[1].as_slice()];
        bolero::check!().for_each(|input: &[u8]| {
            let bytes = Bytes::from(weightfs_fuzz::foreign(&samples, input));
            let Ok(reply) = <peer::LocateReply as prost::Message>::decode(bytes) else { return };
            if let Some(Answer::Refer(nodes)) = answer(reply) {
                assert!(nodes.len() <= MAX_REFERRED);
            }
        });
    }
}
