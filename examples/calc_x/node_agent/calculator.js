// A calculator: no eval, and a bound on the length.

const MAX_LENGTH = 200;

// "(14+3)*2" -> 34. Throws an Error for what is not a calculation.
export function evaluate(expression) {
  if (expression.length > MAX_LENGTH) throw new Error("expression too long");
  const tokens = expression.match(/\d+\.?\d*|\.\d+|[^\s]/g) ?? [];
  let at = 0;

  function value() {
    const token = tokens[at++];
    if (token === "-") return -value();
    if (token === "(") {
      const inside = sum();
      if (tokens[at++] !== ")") throw new Error("not a calculation");
      return inside;
    }
    if (!/\d/.test(token ?? "")) throw new Error("not a calculation");
    return Number(token);
  }

  function product() {
    let total = value();
    while (tokens[at] === "*" || tokens[at] === "/") total = tokens[at++] === "*" ? total * value() : total / value();
    return total;
  }

  function sum() {
    let total = product();
    while (tokens[at] === "+" || tokens[at] === "-") total += tokens[at++] === "+" ? product() : -product();
    return total;
  }

  const result = sum();
  if (at < tokens.length || !Number.isFinite(result)) throw new Error("not a calculation");
  return result;
}
