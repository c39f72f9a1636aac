// What the server says, as a person at the page can use it.

/** Options of a request, addresses and commands: cures for who writes programs. */
const TECHNICAL = /`|--conf|\b(?:GET|POST|PUT|DELETE) \/|\b[a-z]+(?:_[a-z]+)+=|\bnum_proposals\b/;

/**
 * A message without the sentences that speak of options the page does not offer; all of it where nothing else would be left.
 * @param {string} message
 */
export function sayOnPage(message) {
  const sentences = message.split(/(?<=[.?!]) (?=\S)/);
  const plain = sentences.filter((sentence) => !TECHNICAL.test(sentence));
  return plain.length ? plain.join(" ") : message;
}
